"""One cache line more per row, for what only products read."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.passes import composite
from turbo_tvm.passes.widen_rows import widen_rows

t = TypeVar("t")

PLAIN = '{"activation": null, "norm_eps": null, "residual": false}'
WIDE = '{"activation": null, "columns": 1024, "norm_eps": null, "residual": false}'


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

    tvm.ir.assert_structural_equal(widen_rows(Before), Expected)


def widths(columns: int = 1024, *, reader: str | None = None, first: dict | None = None) -> list[int]:
    """The columns of two products in a row, the first with attributes `first` and a second reader."""
    tiles = tirx.Var("t", "int64")

    def rows(n):
        return relax.TensorType((tiles, 4, n), "float32")

    x, r = relax.Var("x", rows(8)), relax.Var("r", rows(columns))
    w = relax.Var("w", relax.TensorType((columns, 8), "float32"))
    v = relax.Var("v", relax.TensorType((8, columns), "float32"))
    c, d = (relax.Var(name, relax.TensorType((n,), "float32")) for name, n in (("c", columns), ("d", 8)))
    plain = {"activation": None, "norm_eps": None, "residual": False}
    attrs = plain | (first or {})
    extra = [*([r] if attrs["residual"] else []), *([c, c] if attrs["norm_eps"] else [])]
    bb = relax.BlockBuilder()
    with bb.function("main", [x, r, w, v, c, d], attrs={"num_input": 2}):
        with bb.dataflow():
            y = bb.emit(composite.make("linear", [x, w, c, *extra], rows(columns), **attrs))
            z = bb.emit(composite.make("linear", [y, v, d], rows(8), **plain))
            if reader == "operator":
                z = bb.emit(relax.op.add(z, bb.emit(relax.op.sum(y, axis=[-1], keepdims=True))))
            if reader == "residual":
                y2 = composite.make("linear", [x, w, c, y], rows(columns), **(plain | {"residual": True}))
                z = bb.emit(composite.make("linear", [bb.emit(y2), v, d], rows(8), **plain))
            if reader == "product":
                other = bb.emit(composite.make("linear", [y, v, d], rows(8), **(plain | {"activation": "tanh"})))
                z = bb.emit(relax.op.add(z, other))
            out = bb.emit_output(relax.Tuple([z, y]) if reader == "output" else z)
        bb.emit_func_output(out)
    bindings = [b for block in widen_rows(bb.finalize())["main"].body.blocks for b in block.bindings]
    return [int(b.value.ty_args[0].shape.values[-1]) for b in bindings if composite.match(b.value) is not None]


@pytest.mark.parametrize("columns", [1024, 3072])
def test_widths_of_whole_pages(columns):
    assert widths(columns) == [columns + 16, 8]


@pytest.mark.parametrize("columns", [1008, 1040, 768])
def test_other_widths_are_left_alone(columns):
    assert widths(columns) == [columns, 8]


def test_several_products_may_read_it():
    assert widths(reader="product") == [1040, 8, 8]


def test_activation_of_the_writing_product_makes_no_difference():
    assert widths(first={"activation": "gelu"}) == [1040, 8]


@pytest.mark.parametrize("reader", ["operator", "output"])
def test_what_anything_else_reads_is_left_alone(reader):
    assert widths(reader=reader) == [1024, 8]


def test_what_is_a_residual_is_left_alone():
    assert 1040 not in widths(reader="residual")


@pytest.mark.parametrize("first", [{"norm_eps": 1e-5}, {"residual": True}])
def test_products_with_norm_or_residual_are_left_alone(first):
    assert widths(first=first) == [1024, 8]
