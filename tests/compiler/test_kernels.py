"""Which kernel implements a composite, what it is called, and what it costs."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
import tvm
from transformers import BertConfig, BertModel
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.compiler import pipeline
from turbo_tvm.compiler.kernel_names import kernel_name
from turbo_tvm.compiler.kernels import CpuKernels, inventory
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.passes.composite import Composite
from turbo_tvm.schedules.cpu.tiles import AMX, BASELINE, CpuTiles

TILES = CpuTiles(lanes=16, row_tile=4, tile_units=3, col_tile=16)  # as wide as bf16 needs
BF16 = "uint16"
DISTANCES = 80  # columns of a table over distances: of 24 tokens 47, and the lanes past the last query

t = TypeVar("t")


def tensor(*shape: int, dtype: str = "float32") -> relax.Var:
    """A weight of this shape, or packed rows if its first dimension is -1."""
    dims = [tirx.Var("t", "int64") if d < 0 else d for d in shape]
    return relax.Var("x", relax.TensorType(dims, dtype))


def rows(columns: int, dtype: str = "float32") -> relax.TensorType:
    return relax.TensorType((tirx.Var("t", "int64"), TILES.row_tile, columns), dtype)


def linear(
    k: int = 16,
    n: int = 8,
    *,
    x_width: int | None = None,
    dtype: str = "float32",
    extra: str = "float32",
    extra_width: int | None = None,
    **attrs,
) -> Composite:
    attrs = {"activation": None, "residual": False, "norm_eps": None} | attrs
    panels = TILES.panels(n)
    steps, weight_type = (k // 2, "int32") if dtype == BF16 else (k, "float32")
    weight = tensor(panels, steps, TILES.col_tile, dtype=weight_type)
    x, bias = tensor(-1, 4, x_width or k, dtype=dtype), tensor(panels * TILES.col_tile)
    residual = [tensor(-1, 4, extra_width or n, dtype=extra)] if attrs["residual"] else []
    return Composite("linear", (x, weight, bias, *residual, *([bias, bias] if attrs["norm_eps"] else [])), attrs)


def attention(*, bias: bool = False, dtype: str = "float32", **attrs) -> Composite:
    attrs = {
        "heads": 2,
        "head_dim": 8,
        "scale": 8**-0.5,
        "max_length": 24,
        "columns": [[48, 0], [48, 16], [48, 32]],
    } | attrs
    table = [tensor(attrs["heads"], 2 * attrs["max_length"] - 1)] if bias else []
    packed = tensor(attrs["heads"] * attrs["head_dim"] * DISTANCES)
    table += [packed] * sum(key in attrs for key in ("key_distances", "query_distances"))
    qkv = [tensor(-1, 4, width, dtype=dtype) for width, _ in attrs["columns"]]
    return Composite("attention", (*qkv, tensor(-1, 3, dtype="int32"), *table), attrs)


def pack_distances(*, heads: int = 2, head_dim: int = 8, **pairs: bool) -> tuple[Composite, relax.TensorType]:
    sizes = {"heads": heads, "head_dim": head_dim, "columns": 47, "width": DISTANCES}
    size = heads * (head_dim // (2 if pairs else 1)) * DISTANCES
    packed = relax.TensorType((size,), "int32" if pairs else "float32")
    return Composite("pack_distances", (tensor(heads, head_dim, 47),), sizes | pairs), packed


def norm(
    *,
    columns: int = 16,
    width: int | None = None,
    extra_width: int | None = None,
    dtype: str = "float32",
    **attrs,
) -> Composite:
    attrs = {"eps": 1e-5, "residual": False} | attrs
    x, gamma = tensor(-1, 4, width or columns, dtype=dtype), tensor(columns)
    extra = [tensor(-1, 4, extra_width or columns)] if attrs["residual"] else []
    return Composite("norm", (x, *extra, gamma, gamma), attrs)


def normalize(dtype: str = "float32") -> Composite:
    return Composite("normalize", (tensor(-1, 4, 16, dtype=dtype),), {"eps": 1e-12})


def embedding(*, tables: int, norm_eps: float | None = None, dtype: str = "float32") -> Composite:
    ids, gammas = [tensor(-1, 4, dtype="int32")] * tables, [tensor(16)] * (2 if norm_eps else 0)
    looked_up = [tensor(50, 16, dtype=dtype)] * tables
    return Composite("embedding", (*ids, *looked_up, *gammas), {"tables": tables, "norm_eps": norm_eps})


def pool(mode: str, *, width: int = 16, dtype: str = "float32") -> Composite:
    return Composite("pool", (tensor(-1, 4, width, dtype=dtype), tensor(-1, dtype="int32")), {"mode": mode})


VARIANTS = [
    (linear(), rows(8)),
    (linear(k=32), rows(8)),
    (linear(n=16), rows(16)),
    (linear(activation="gelu"), rows(8)),
    (linear(activation="gelu_tanh"), rows(8)),
    (linear(activation="relu"), rows(8)),
    (linear(residual=True), rows(8)),
    (linear(norm_eps=1e-12), rows(8)),
    (linear(norm_eps=1e-5), rows(8)),
    (linear(residual=True, norm_eps=1e-5), rows(8)),
    (linear(x_width=32), rows(8)),
    (linear(columns=8), rows(24)),
    (attention(), rows(16)),
    (attention(bias=True), rows(16)),
    (attention(scale=1.0), rows(16)),
    (attention(max_length=48), rows(16)),
    (attention(heads=4, head_dim=4, scale=0.5), rows(16)),
    (attention(columns=[[16, 0]] * 3), rows(16)),
    (attention(window=5), rows(16)),
    (attention(kv_heads=1, columns=[[16, 0], [8, 0], [8, 0]]), rows(16)),
    (attention(key_distances=True), rows(16)),
    (attention(query_distances=True, bias=True), rows(16)),
    (attention(key_distances=True, query_distances=True, window=5), rows(16)),
    (norm(), rows(16)),
    (norm(residual=True), rows(16)),
    (norm(eps=1e-12), rows(16)),
    (norm(columns=32), rows(32)),
    (norm(width=24), rows(16)),
    (norm(residual=True, extra_width=24), rows(16)),
    (norm(), rows(24)),
    (norm(), rows(16, BF16)),
    (norm(dtype=BF16), rows(16)),
    (norm(dtype=BF16), rows(16, BF16)),
    (normalize(), rows(16)),
    (normalize(dtype=BF16), rows(16, BF16)),
    (normalize(dtype=BF16), rows(16)),
    (embedding(tables=1), rows(16)),
    (embedding(tables=3), rows(16)),
    (embedding(tables=3, norm_eps=1e-5), rows(16)),
    (embedding(tables=3, norm_eps=1e-5), rows(24)),
    (embedding(tables=3, dtype=BF16), rows(16)),
    (embedding(tables=3, dtype=BF16), rows(16, BF16)),
    (pool("first"), rows(16)),
    (pool("mean"), rows(16)),
    (pool("mean", width=24), rows(16)),
    (pool("mean", dtype=BF16), rows(16)),
    (linear(dtype=BF16), rows(8)),
    (linear(dtype=BF16), rows(8, BF16)),
    (linear(), rows(8, BF16)),
    (linear(dtype=BF16, residual=True), rows(8)),
    (linear(dtype=BF16, residual=True, extra=BF16), rows(8)),
    (linear(dtype=BF16, residual=True, extra=BF16, extra_width=24), rows(8)),
    (linear(dtype=BF16, x_width=32, columns=8), rows(24, BF16)),
    (attention(dtype=BF16), rows(16)),
    (attention(dtype=BF16), rows(16, BF16)),
    (attention(columns=[[80, 0], [80, 16], [80, 32]]), rows(16)),
    (attention(columns=[[48, 0], [48, 16], [16, 0]]), rows(16)),
    (attention(), rows(48)),
    (Composite("cast_rows", (tensor(-1, 4, 16),)), rows(16, BF16)),
    (Composite("cast_weight", (tensor(9, 16),), {"shape": [9, 16]}), relax.TensorType((9, 16), BF16)),
    (Composite("cast_weight", (tensor(9, 8),), {"shape": [9, 8]}), relax.TensorType((9, 8), BF16)),
    (
        Composite("pack_weight", (tensor(8, 16),), {"k": 16, "n": 8, "pairs": True}),
        relax.TensorType((1, 8, 8), "int32"),
    ),
    (Composite("pack_weight", (tensor(8, 16),), {"k": 16, "n": 8}), relax.TensorType((1, 16, 8), "float32")),
    (Composite("pack_weight", (tensor(16, 8),), {"k": 8, "n": 16}), relax.TensorType((2, 8, 8), "float32")),
    (Composite("pack_bias", (tensor(8),), {"n": 8}), relax.TensorType((8,), "float32")),
    pack_distances(),
    pack_distances(heads=1, head_dim=16),
    pack_distances(pairs=True),
    (Composite("tile_rows", (tensor(-1, 16),), {}), rows(16)),
    (Composite("untile_rows", (tensor(-1, 4, 16),), {}), relax.TensorType((tirx.Var("s", "int64"), 16), "float32")),
]


def test_every_parameter_shows_in_the_name():
    names = [kernel_name(fused, out) for fused, out in VARIANTS]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)


def test_names_are_readable():
    assert kernel_name(linear(768, 3072, activation="gelu"), rows(3072)) == "linear_768x3072_gelu"
    assert kernel_name(attention(), rows(16)) == "attention_2x8_merged_max24"
    assert kernel_name(linear(norm_eps=1e-12, residual=True), rows(8)) == "linear_16x8_norm_eps1e_12_residual"
    assert kernel_name(linear(dtype=BF16), rows(8, BF16)) == "linear_16x8_bf16"
    assert kernel_name(linear(dtype=BF16), rows(8)) == "linear_16x8_bf16_out_fp32"
    wide = linear(dtype=BF16, residual=True, x_width=48, extra_width=40, columns=8)
    assert kernel_name(wide, rows(40, BF16)) == "linear_16x8_residual_from48_plus40_to40_bf16_extra_fp32"
    assert kernel_name(embedding(tables=2, dtype=BF16), rows(16)) == "embedding_16_tables2_bf16_out_fp32"
    merged = attention(columns=[[80, 0], [80, 16], [80, 32]])
    assert kernel_name(merged, rows(24)) == "attention_2x8_merged_in80_max24_to24"


@pytest.mark.parametrize("fused, out", VARIANTS, ids=[kernel_name(*variant) for variant in VARIANTS])
def test_every_composite_has_a_kernel_of_its_tensors_and_its_output(fused, out):
    name, func = CpuKernels(TILES)(fused, out)
    assert name == kernel_name(fused, out)
    assert isinstance(func, tirx.PrimFunc)
    if fused.tensors:
        assert len(func.params) == len(fused.tensors) + 1


def wide_attention(head_dim: int = 32, **options) -> Composite:
    inner = 2 * head_dim
    columns = [[3 * inner, i * inner] for i in range(3)]
    return attention(**{"head_dim": head_dim, "scale": head_dim**-0.5, "columns": columns, "dtype": BF16} | options)


@pytest.mark.parametrize(
    "fused, out, name",
    [
        (linear(dtype=BF16), rows(8, BF16), "linear_16x8_bf16_amx"),
        (linear(dtype=BF16), rows(8), "linear_16x8_bf16_out_fp32_amx"),
        (wide_attention(), rows(64, BF16), "attention_2x32_merged_max24_bf16_amx"),
        (wide_attention(96), rows(192, BF16), "attention_2x96_merged_max24_bf16_amx"),
    ],
)
def test_what_runs_in_tiles_of_amx(fused, out, name):
    made, func = CpuKernels(AMX)(fused, out)
    assert made == name == kernel_name(fused, out, amx=True) == kernel_name(fused, out) + "_amx"
    assert "turbo_amx_dot" in func.script()
    assert "turbo_amx_dot" not in CpuKernels(TILES)(fused, out)[1].script()


@pytest.mark.parametrize(
    "fused, out",
    [
        (linear(), rows(8)),
        (linear(), rows(8, BF16)),
        (wide_attention(dtype="float32"), rows(64)),
        (wide_attention(), rows(64)),
        (wide_attention(48), rows(96, BF16)),
        (wide_attention(bias=True), rows(64, BF16)),
        (norm(dtype=BF16), rows(16, BF16)),
        (embedding(tables=1, dtype=BF16), rows(16, BF16)),
    ],
)
def test_what_does_not_fit_runs_as_without_amx(fused, out):
    made, func = CpuKernels(AMX)(fused, out)
    assert made == kernel_name(fused, out, amx=True) == kernel_name(fused, out)
    assert "turbo_amx" not in func.script()


def test_same_parameters_share_one_kernel():
    first, second = CpuKernels(TILES), CpuKernels(CpuTiles(16, 4, 3, 16))
    kernel = first(linear(), rows(8))[1]
    assert first(linear(), rows(8))[1].same_as(kernel)
    assert second(linear(), rows(8))[1].same_as(kernel)


def test_other_parameters_and_tiles_are_other_kernels():
    kernel = CpuKernels(TILES)(linear(), rows(8))[1]
    assert not CpuKernels(TILES)(linear(residual=True), rows(8))[1].same_as(kernel)
    assert not CpuKernels(CpuTiles(16, 6, 3, 16))(linear(), rows(8))[1].same_as(kernel)


def test_kernels_have_a_root_block():
    for fused, out in (linear(), rows(8)), (pool("mean"), rows(16)):
        assert isinstance(CpuKernels(TILES)(fused, out)[1].body, tvm.s_tir.SBlockRealize)


def test_an_unknown_composite_is_an_error():
    with pytest.raises(AttributeError, match="_convolution"):
        CpuKernels(TILES)(Composite("convolution", (), {}), rows(8))


@pytest.fixture(scope="module")
def tiny() -> dict[str, object]:
    """The inventory of a BERT of 2 layers, hidden 16, 2 heads, feed-forward 32, 50 words, 24 positions; by name."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    mod = import_module(BertModel(config).eval()).mod
    return {k.name: k for k in pipeline.optimize(mod, BASELINE, 24).kernels}


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
    wide = '{"activation": null, "columns": 8, "norm_eps": null, "residual": false}'

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

    (spec,) = inventory(Module, CpuKernels(BASELINE))
    assert (spec.name, spec.shapes, spec.flops_per_token) == ("linear_16x8_to24", "16 -> 8", 2 * 16 * 8)
