"""One cache line more per row, for what only our operators read."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import tvm
from operators import operators_of
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Attention, Embedding, L2Normalize, Linear, Norm, Operator, Pool
from turbo_tvm.ops.call import to_call
from turbo_tvm.ops.operand import width
from turbo_tvm.passes.widen_rows import widen_rows

t = TypeVar("t")

TILES = tirx.Var("t", "int64")

PLAIN = '{"tensors": ["x", "weight", "bias"]}'
WIDE = '{"columns": 1024, "tensors": ["x", "weight", "bias"]}'


def test_rows_between_two_products_are_widened():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            w: R.Tensor((1024, 8), "float32"),
            c: R.Tensor((1024,), "float32"),
            v: R.Tensor((8, 1024), "float32"),
            d: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 1024), "float32"))
                z = R.call_dps_packed("turbo.linear", (y, v, d, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(z)
            return z

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            w: R.Tensor((1024, 8), "float32"),
            c: R.Tensor((1024,), "float32"),
            v: R.Tensor((8, 1024), "float32"),
            d: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(WIDE)), out_ty=R.Tensor((t, 4, 1040), "float32"))
                z = R.call_dps_packed("turbo.linear", (y, v, d, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(z)
            return z

    tvm.ir.assert_structural_equal(widen_rows(Before, "main"), Expected)


def widths(columns: int = 1024, *, reader: str | None = None, first: str = "") -> list[int]:
    """The columns of two products in a row, the first with what `first` names fused into it and a second reader."""
    tiles = tirx.Var("t", "int64")

    def rows(n):
        return relax.TensorType((tiles, 4, n), "float32")

    x, r = relax.Var("x", rows(8)), relax.Var("r", rows(columns))
    w = relax.Var("w", relax.TensorType((columns, 8), "float32"))
    v = relax.Var("v", relax.TensorType((8, columns), "float32"))
    c, d = (relax.Var(name, relax.TensorType((n,), "float32")) for name, n in (("c", columns), ("d", 8)))
    fused: dict[str, dict[str, Any]] = {
        "": {},
        "activation": {"activation": "gelu"},
        "norm": {"gamma": c, "beta": c, "norm_eps": 1e-5},
        "residual": {"residual": r},
    }

    def second(y, **more):
        return to_call(Linear(x=y, weight=v, bias=d, out=rows(8), **more))

    bb = relax.BlockBuilder()
    with bb.function("main", [x, r, w, v, c, d], attrs={"num_input": 2}):
        with bb.dataflow():
            y = bb.emit(to_call(Linear(x=x, weight=w, bias=c, out=rows(columns), **fused[first])))
            z = bb.emit(second(y))
            if reader == "operator":
                z = bb.emit(relax.op.add(z, bb.emit(relax.op.sum(y, axis=[-1], keepdims=True))))
            if reader == "residual":
                y2 = to_call(Linear(x=x, weight=w, bias=c, residual=y, out=rows(columns)))
                z = bb.emit(second(bb.emit(y2)))
            if reader == "product":
                other = bb.emit(second(y, activation="tanh"))
                z = bb.emit(relax.op.add(z, other))
            out = bb.emit_output(relax.Tuple([z, y]) if reader == "output" else z)
        bb.emit_func_output(out)
    return [width(f.out) for f in operators_of(widen_rows(bb.finalize(), "main"))]


@pytest.mark.parametrize("columns", [1024, 3072])
def test_widths_of_whole_pages(columns):
    assert widths(columns) == [columns + 16, 8]


@pytest.mark.parametrize("columns", [1008, 1040, 768])
def test_other_widths_are_left_alone(columns):
    assert widths(columns) == [columns, 8]


def test_several_products_may_read_it():
    assert widths(reader="product") == [1040, 8, 8]


def test_activation_of_the_writing_product_makes_no_difference():
    assert widths(first="activation") == [1040, 8]


@pytest.mark.parametrize("reader", ["operator", "output"])
def test_what_anything_else_reads_is_left_alone(reader):
    assert widths(reader=reader) == [1024, 8]


def test_a_residual_is_widened_and_so_is_its_sum():
    assert widths(reader="residual") == [1040, 1040, 8]


@pytest.mark.parametrize("first", ["norm", "residual"])
def test_products_with_norm_or_residual_are_widened(first):
    assert widths(first=first) == [1040, 8]


def rows(columns: int, dtype: str = "float32") -> relax.TensorType:
    return relax.TensorType((TILES, 4, columns), dtype)


def widened(params: list[relax.Var], *steps, result: int = -1, amx: bool = False) -> list[Any]:
    """Operators in a row, widened; a step makes one from what there is so far; `result` is returned."""
    bb = relax.BlockBuilder()
    with bb.function("main", params, attrs={"num_input": 1}):
        with bb.dataflow():
            values = list(params)
            for step in steps:
                values.append(bb.emit(step(*values)))
            out = bb.emit_output(values[result])
        bb.emit_func_output(out)
    mod = widen_rows(bb.finalize(), "main", amx)
    again = widen_rows(mod, "main", amx)
    tvm.ir.assert_structural_equal(again, mod)
    return operators_of(mod)


def widths_of(found: list[Operator]) -> list[int]:
    return [width(f.out) for f in found]


def weight(name: str, *shape: int) -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, "float32"))


def norm(x: relax.Var, gamma: relax.Var, dtype: str = "float32") -> relax.Call:
    return to_call(Norm(x=x, gamma=gamma, beta=gamma, eps=1e-5, out=rows(width(gamma), dtype)))


def product(x: relax.Var, w: relax.Var, bias: relax.Var, dtype: str = "float32") -> relax.Call:
    return to_call(Linear(x=x, weight=w, bias=bias, out=rows(int(w.ty.shape.values[0]), dtype)))


def attend(q, k, v, query_tiles, first_columns=(0, 0, 0)) -> relax.Call:
    sizes = {"heads": 16, "head_dim": 64, "scale": 0.125, "max_length": 24, "first_columns": first_columns}
    return to_call(Attention(q=q, k=k, v=v, query_tiles=query_tiles, out=rows(1024), **sizes))


def embed(ids: relax.Var, table: relax.Var) -> relax.Call:
    return to_call(Embedding(ids=(ids,), tables=(table,), out=rows(1024)))


QUERY_TILES = relax.Var("query_tiles", relax.TensorType((tirx.Var("n", "int64"), 3), "int32"))


def test_norms_and_embeddings_are_widened():
    params = [relax.Var("ids", relax.TensorType((TILES, 4), "int32")), weight("table", 9, 1024), weight("gamma", 1024)]
    params += [weight("w", 8, 1024), weight("c", 8)]
    found = widened(
        params,
        lambda ids, table, *_: embed(ids, table),
        lambda *v: norm(v[5], v[2]),
        lambda *v: product(v[6], v[3], v[4]),
    )
    assert widths_of(found) == [1040, 1040, 8]
    assert [type(f) for f in found] == [Embedding, Norm, Linear]
    assert ["columns" in f.attributes() for f in found] == [False] * 3


def test_attention_says_how_wide_its_inputs_have_become():
    params = [relax.Var("x", rows(8)), QUERY_TILES, weight("w", 3072, 8), weight("c", 3072), weight("v", 8, 1024)]
    found = widened(
        [*params, weight("d", 8)],
        lambda *v: product(v[0], v[2], v[3]),
        lambda *v: attend(v[6], v[6], v[6], v[1], (0, 1024, 2048)),
        lambda *v: product(v[7], v[4], v[5]),
    )
    assert widths_of(found) == [3088, 1040, 8]
    assert found[1].operand_columns == ((3088, 0), (3088, 1024), (3088, 2048))


def test_only_those_inputs_of_attention_that_are_widened_have_other_columns():
    params = [relax.Var("x", rows(8)), relax.Var("k", rows(1024)), QUERY_TILES, weight("w", 1024, 8), weight("c", 1024)]
    found = widened(
        params,
        lambda *v: product(v[0], v[3], v[4]),
        lambda *v: attend(v[5], v[1], v[5], v[2]),
    )
    assert widths_of(found) == [1040, 1024]
    assert found[1].operand_columns == ((1040, 0), (1024, 0), (1040, 0))


@pytest.mark.parametrize(("columns", "wanted"), [(1024, 1024), (2048, 2080), (3072, 3072), (4096, 4128)])
def test_bf16_has_more_columns_to_a_page_and_to_a_line(columns, wanted):
    params = [relax.Var("x", rows(8, "uint16")), weight("w", columns, 8), weight("c", columns)]
    found = widened(
        [*params, weight("v", 8, columns), weight("d", 8)],
        lambda *v: product(v[0], v[1], v[2], "uint16"),
        lambda *v: product(v[5], v[3], v[4]),
    )
    assert widths_of(found) == [wanted, 8]


@pytest.mark.parametrize(
    ("columns", "wanted"), [(32, 32), (64, 96), (384, 416), (400, 400), (768, 800), (2336, 2336), (3072, 3104)]
)
def test_for_amx_tiles_bf16_rows_are_an_odd_number_of_lines_apart(columns, wanted):
    """One line, two, 12, 12.5, 24, 73 and 96."""
    params = [relax.Var("x", rows(8, "uint16")), weight("w", columns, 8), weight("c", columns)]
    steps = (
        lambda *v: product(v[0], v[1], v[2], "uint16"),
        lambda *v: product(v[5], v[3], v[4]),
    )
    found = widened([*params, weight("v", 8, columns), weight("d", 8)], *steps, amx=True)
    assert widths_of(found) == [wanted, 8]


@pytest.mark.parametrize(("columns", "wanted"), [(768, 768), (1024, 1040)])
def test_for_amx_fp32_rows_are_as_ever(columns, wanted):
    params = [relax.Var("x", rows(8)), weight("w", columns, 8), weight("c", columns)]
    steps = (lambda *v: product(v[0], v[1], v[2]), lambda *v: product(v[5], v[3], v[4]))
    found = widened([*params, weight("v", 8, columns), weight("d", 8)], *steps, amx=True)
    assert widths_of(found) == [wanted, 8]


@pytest.mark.parametrize("made", ["norm", "attention", "embedding"])
def test_outputs_of_the_model_keep_their_width(made):
    ids = relax.Var("ids", relax.TensorType((TILES, 4), "int32"))
    params = [relax.Var("x", rows(1024)), QUERY_TILES, weight("gamma", 1024), ids]
    steps = {
        "norm": lambda *v: norm(v[0], v[2]),
        "attention": lambda *v: attend(v[0], v[0], v[0], v[1]),
        "embedding": lambda *v: embed(v[3], v[2]),
    }
    assert widths_of(widened(params, steps[made])) == [1024]


@pytest.mark.parametrize(
    "made",
    [
        lambda x, cu_seqlens: Pool(x=x, cu_seqlens=cu_seqlens, mode="mean", out=rows(1024)),
        lambda x, cu_seqlens: L2Normalize(x=x, eps=1e-12, out=rows(1024)),
    ],
    ids=["pool", "normalize"],
)
def test_kernels_that_write_no_wider_rows_are_left_alone(made):
    cu_seqlens = relax.Var("cu_seqlens", relax.TensorType((tirx.Var("n", "int64"),), "int32"))
    params = [relax.Var("x", rows(1024)), cu_seqlens, weight("v", 8, 1024), weight("d", 8)]
    found = widened(
        params,
        lambda *v: to_call(made(v[0], v[1])),
        lambda *v: product(v[4], v[2], v[3]),
    )
    assert widths_of(found) == [1024, 8]
