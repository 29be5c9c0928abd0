"""DeBERTa against PyTorch: disentangled attention, packed on CPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import turbo_tvm
from turbo_tvm.compiler import pipeline, targets
from turbo_tvm.errors import TargetError
from turbo_tvm.frontends.options import ImportOptions
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.schedules.cpu.tiles import AVX2
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

LONGEST = 64
LENGTHS = (1, 2, 7, 33, 64, 16, 17, 5)


def build(kind: type, **changes) -> torch.nn.Module:
    """A small DeBERTa v3: 2 heads of 16, 16 buckets for up to 64 tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    v3 = {
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    limits = {"intermediate_size": 64, "max_position_embeddings": LONGEST}
    model = kind(transformers.DebertaV2Config(**sizes | limits | v3 | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.inference_mode()
def reference(model: torch.nn.Module, sequence: np.ndarray, output: str) -> np.ndarray:
    ids = torch.from_numpy(sequence)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids))[output][0].numpy()


def answers(compiled: turbo_tvm.CompiledModel, model: torch.nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """A ragged batch's, and PyTorch's for each sequence alone."""
    requests = [np.random.default_rng(n).integers(1, 101, n) for n in LENGTHS]
    output = compiled.manifest.primary
    return [(got, reference(model, s, output)) for s, got in zip(requests, compiled.run(requests), strict=True)]


def test_a_classifier_is_packed_and_agrees_with_pytorch():
    """As v3 has it: terms of both kinds, buckets, shared projections. An embedding masked, and pooled by its first."""
    model = build(transformers.DebertaV2ForSequenceClassification)
    compiled = turbo_tvm.compile(model, progress=False)
    assert compiled.manifest.layout == "packed"
    assert {spec.kind for spec in compiled.manifest.inputs} == {"token_ids", "cu_seqlens", "query_tiles"}
    assert sum(k.calls for k in compiled.manifest.kernels if k.family == "attention") == 1
    for got, wanted in answers(compiled, model):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bf16_points_where_pytorch_does():
    """As v2 without sharing: own projections of positions, one term, positions in the input."""
    try:
        targets.check_precision(targets.resolve("cpu"), "bf16")
    except TargetError:
        pytest.skip("needs a CPU with AVX512-BF16")
    own = {"share_att_key": False, "pos_att_type": ["c2p"], "position_buckets": -1, "norm_rel_ebd": "none"}
    model = build(transformers.DebertaV2Model, **own, position_biased_input=True, type_vocab_size=2)
    compiled = turbo_tvm.compile(model, precision="bf16", progress=False)
    assert compiled.manifest.layout == "packed"
    for got, wanted in answers(compiled, model):
        cosine = (got * wanted).sum(-1) / (np.linalg.norm(got, axis=-1) * np.linalg.norm(wanted, axis=-1))
        assert cosine.min() > 0.9995


@pytest.mark.parametrize(
    ("tiles", "changes", "reason"),
    [
        pytest.param(CUDA_TILES, {}, "disentangled attention, which the GPU", id="a GPU's kernel knows no such tables"),
        pytest.param(
            AVX2, {"conv_kernel_size": 3}, "mask", marks=pytest.mark.slow, id="a convolution mixes neighbours"
        ),
    ],
)
def test_what_is_padded(tiles, changes, reason):
    model = build(transformers.DebertaV2Model, **changes)
    optimized = pipeline.optimize(import_module(model, ImportOptions(max_length=9)).mod, tiles, 9)
    assert optimized.layout == "padded" and reason in optimized.declined[0]
