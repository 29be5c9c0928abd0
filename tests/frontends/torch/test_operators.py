"""Operators that TVM's importer lacks or gets wrong, in a graph of PyTorch's, against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from turbo_tvm.frontends.torch.export import to_relax
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.ops.inputs import InputKind


class Attends(torch.nn.Module):
    """scaled_dot_product_attention in its variants, on embedded ids."""

    def __init__(self, variant: str):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 24)
        self.variant = variant

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        ids, mask = inputs
        batch, length = ids.shape
        x = self.embed(ids).view(batch, length, 4, 6).transpose(1, 2)
        attend = torch.nn.functional.scaled_dot_product_attention
        if self.variant == "scale":
            return attend(x, x, x, scale=0.3)
        if self.variant == "grouped":
            return attend(x, x[:, :2], x[:, 2:], enable_gqa=True)
        return attend(x, x, x, attn_mask=mask.bool()[:, None, None, :])


class Norms(torch.nn.Module):
    """Layer norms without shift, and without gain."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 24)
        self.norm = torch.nn.LayerNorm(24, bias=False)
        self.bare = torch.nn.LayerNorm(24, elementwise_affine=False)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        ids = inputs[0]
        return self.norm(self.embed(ids)) + self.bare(self.embed(ids))


@pytest.mark.parametrize(
    "model", [Attends("scale"), Attends("grouped"), Attends("bool"), Norms()], ids=["scale", "grouped", "bool", "norms"]
)
def test_agrees_with_pytorch(model):
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    mod, weights = to_relax(model.eval(), (InputKind.TOKEN_IDS, InputKind.ATTENTION_MASK), (ids, mask), max_length=16)
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    found = machine[ENCODE](tvm.runtime.tensor(ids.numpy()), tvm.runtime.tensor(mask.numpy()), *weights).numpy()
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(ids, mask).numpy(), atol=1e-5)
