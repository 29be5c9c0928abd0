"""Which kernel implements an operator, what it is called on a target, and what a model's kernels cost."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
import tvm
from operator_variants import (
    SHORT,
    TILES,
    VARIANTS,
    attention,
    embedding,
    in_graph,
    linear,
    norm,
    pool,
    rows,
    short,
    softmax,
)
from transformers import BertConfig, BertModel
from tvm import tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.compiler import pipeline
from turbo_tvm.compiler.kernels import Kernels, inventory
from turbo_tvm.ops import Attention, Operator, Softmax
from turbo_tvm.schedules.cpu.tiles import AMX, BASELINE, CpuTiles

t = TypeVar("t")


ON_CPU = [variant for variant in VARIANTS if not isinstance(variant, Softmax)]  # a CPU leaves that to TVM


@pytest.mark.parametrize("operator", ON_CPU, ids=[variant.kernel_name() for variant in ON_CPU])
def test_every_operator_has_a_kernel_of_its_tensors_and_its_output(operator):
    name, func = Kernels(TILES)(in_graph(operator))
    assert name == operator.kernel_name()
    assert isinstance(func, tirx.PrimFunc)
    assert len(func.params) == len(operator.tensors) + 1


def wide_attention(head_dim: int = 32, *, narrow: bool = True, dtype: str = SHORT, **more: Any) -> Attention:
    """An attention of 2 heads in bf16; narrow: so is its result."""
    out = short(2 * head_dim) if narrow else rows(2 * head_dim)
    return attention(head_dim=head_dim, dtype=dtype, out=out, **more)


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (linear(16, 8, x=short(16), out=short(8)), "linear_16x8_bf16_amx"),
        (linear(16, 8, x=short(16)), "linear_16x8_bf16_out_fp32_amx"),
        (wide_attention(), "attention_2x32_merged_max24_bf16_amx"),
        (wide_attention(96), "attention_2x96_merged_max24_bf16_amx"),
    ],
)
def test_what_runs_in_tiles_of_amx(operator, name):
    made, func = Kernels(AMX)(operator)
    assert made == name == operator.kernel_name() + "_amx"
    assert "turbo_amx_dot" in func.script()
    plain, func = Kernels(TILES)(operator)
    assert plain == operator.kernel_name()
    assert "turbo_amx_dot" not in func.script()


@pytest.mark.parametrize(
    "operator",
    [
        linear(16, 8),
        linear(16, 8, out=short(8)),
        wide_attention(dtype="float32", narrow=False),
        wide_attention(narrow=False),
        wide_attention(48),
        wide_attention(position_bias=True),
        norm(16, x=short(16), out=short(16)),
        embedding(16, 1, table_type=SHORT, out=short(16)),
    ],
    ids=lambda operator: operator.kernel_name(),
)
def test_what_does_not_fit_runs_as_without_amx(operator):
    made, func = Kernels(AMX)(operator)
    assert made == operator.kernel_name()
    assert "turbo_amx" not in func.script()


def test_same_parameters_share_one_kernel():
    first, second = Kernels(TILES), Kernels(CpuTiles(16, 4, 3, 16))
    kernel = first(in_graph(linear(16, 8)))[1]
    assert first(in_graph(linear(16, 8)))[1].same_as(kernel)
    assert second(in_graph(linear(16, 8)))[1].same_as(kernel)


def test_other_parameters_and_tiles_are_other_kernels():
    kernel = Kernels(TILES)(linear(16, 8))[1]
    assert not Kernels(TILES)(linear(16, 8, residual=True))[1].same_as(kernel)
    assert not Kernels(CpuTiles(16, 6, 3, 16))(linear(16, 8))[1].same_as(kernel)


def test_kernels_have_a_root_block():
    for operator in (linear(16, 8), pool("mean")):
        assert isinstance(Kernels(TILES)(operator)[1].body, tvm.s_tir.SBlockRealize)


def test_an_operator_without_a_kernel_is_an_error():
    class Convolution(Operator):
        NAME = "convolution"

    for operator in (Convolution(out=rows(8)), softmax(16)):
        with pytest.raises(LookupError, match=f"no kernel for {operator.NAME}"):
            Kernels(TILES)(operator)


@pytest.fixture(scope="module")
def tiny(shared) -> dict[str, object]:
    """The inventory of `bert`, by name."""
    mod = shared.imported("bert of test_kernels", bert).mod
    return {k.name: k for k in pipeline.optimize(mod, BASELINE, 24).kernels}


def bert() -> BertModel:
    """A BERT of 2 layers, hidden 16, 2 heads, feed-forward 32, 50 words, 24 positions."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    return BertModel(config).eval()


def test_calls_are_counted(tiny):
    assert {name: k.calls for name, k in tiny.items()} == {
        "embedding_16_norm_eps1e_12_tables3": 1,
        "linear_16x48": 2,
        "attention_2x8_merged_max24": 2,
        "linear_16x16_norm_eps1e_12_residual": 2,
        "linear_16x32_gelu": 2,
        "linear_32x16_norm_eps1e_12_residual": 2,
        "pool_16_first": 1,
        "linear_16x16_tanh": 1,
    }


def test_operations_are_counted_per_token_and_per_pair(tiny):
    per_token = {name: k.flops_per_token for name, k in tiny.items() if k.flops_per_token}
    assert per_token == {
        "embedding_16_norm_eps1e_12_tables3": 3 * 16,
        "linear_16x48": 2 * 16 * 48,
        "linear_16x16_norm_eps1e_12_residual": 2 * 16 * 16,
        "linear_16x32_gelu": 2 * 16 * 32,
        "linear_32x16_norm_eps1e_12_residual": 2 * 32 * 16,
    }
    # q k^T and p v: a multiplication and an addition each, per head and its 8 columns
    assert {k.name: k.flops_per_pair for k in tiny.values() if k.flops_per_pair} == {
        "attention_2x8_merged_max24": 2 * 2 * 2 * 8
    }


def test_products_of_sequences_count_as_nothing(tiny):
    assert tiny["linear_16x16_tanh"].flops_per_token == 0


def test_bytes_of_weights_are_those_of_the_packed_ones(tiny):
    assert BASELINE.col_tile == 8
    assert tiny["linear_16x48"].bytes_weights == 4 * (16 * 48 + 48)
    assert tiny["linear_16x32_gelu"].bytes_weights == 4 * (16 * 32 + 32)
    assert tiny["linear_32x16_norm_eps1e_12_residual"].bytes_weights == 4 * (32 * 16 + 3 * 16)
    assert tiny["embedding_16_norm_eps1e_12_tables3"].bytes_weights == 4 * (50 + 2 + 24 + 2) * 16
    assert tiny["attention_2x8_merged_max24"].bytes_weights == 0


def test_wide_rows_count_their_true_columns():
    wide = '{"columns": 8, "tensors": ["x", "weight", "bias"]}'

    @I.ir_module
    class Module:
        @R.function
        def main(
            x: R.Tensor((t, 4, 16), "float32"),
            w: R.Tensor((1, 16, 8), "float32"),
            c: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(wide)), out_ty=R.Tensor((t, 4, 24), "float32"))
                R.output(y)
            return y

    (spec,) = inventory(Module["main"], Kernels(BASELINE))
    assert (spec.name, spec.shapes, spec.flops_per_token) == ("linear_16x8_to24", "16 -> 8", 2 * 16 * 8)
