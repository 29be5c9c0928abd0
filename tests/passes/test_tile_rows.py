"""Row tiling around the row-wise kernels of a padded graph."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from operators import operators_of
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Linear, Norm, Operator, Pool, TileRows, UntileRows
from turbo_tvm.ops.call import to_call
from turbo_tvm.passes.tile_rows import tile_rows

b = TypeVar("b")
s = TypeVar("s")

PLAIN = '{"tensors": ["x", "weight", "bias"]}'
ROWS = '{"tensors": ["x"]}'


def test_product_is_wrapped():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s, 8), "float32"), w: R.Tensor((5, 8), "float32"), c: R.Tensor((5,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((b, s, 5), "float32"))
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((b, s, 8), "float32"), w: R.Tensor((5, 8), "float32"), c: R.Tensor((5,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                flat = R.reshape(x, R.shape([b * s, 8]))
                tiled = R.call_dps_packed(
                    "turbo.tile_rows", (flat, R.str(ROWS)), out_ty=R.Tensor(((b * s + 4 - 1) // 4, 4, 8), "float32")
                )
                y = R.call_dps_packed(
                    "turbo.linear",
                    (tiled, w, c, R.str(PLAIN)),
                    out_ty=R.Tensor(((b * s + 4 - 1) // 4, 4, 5), "float32"),
                )
                rows = R.call_dps_packed("turbo.untile_rows", (y, R.str(ROWS)), out_ty=R.Tensor((b * s, 5), "float32"))
                out = R.reshape(rows, R.shape([b, s, 5]))
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(tile_rows(Before, "main", 4), Expected)


MADE = {
    Linear: lambda x, r, w, v, out: Linear(x=x, weight=w, bias=v, residual=r, out=out),
    Norm: lambda x, r, w, v, out: Norm(x=x, residual=r, gamma=w, beta=v, eps=1e-5, out=out),
    Pool: lambda x, r, w, v, out: Pool(x=x, cu_seqlens=w, mode="mean", out=out),
}


def build(kind: type[Operator], residual: bool, rank: int = 3) -> tvm.IRModule:
    """`main` of one operator on padded rows."""
    lead = [tirx.Var(d, "int64") for d in "bsh"[: rank - 1]]
    rows = relax.TensorType((*lead, 8), "float32")
    x, r = relax.Var("x", rows), relax.Var("r", rows)
    w, v = (relax.Var(name, relax.TensorType((8,), "float32")) for name in "wv")
    bb = relax.BlockBuilder()
    with bb.function("main", [x, r, w, v], attrs={"num_input": 2}):
        with bb.dataflow():
            out = bb.emit_output(to_call(MADE[kind](x, r if residual else None, w, v, rows)))
        bb.emit_func_output(out)
    return bb.finalize()


@pytest.mark.parametrize("kind", [Linear, Norm])
def test_residuals_are_tiled_and_weights_are_not(kind):
    found = operators_of(tile_rows(build(kind, True), "main", 4))
    assert [type(f) for f in found] == [TileRows, TileRows, kind, UntileRows]
    tiled = [argument.name for argument in found[2].arguments() if len(argument.tensor.ty.shape.values) == 3]
    assert tiled == ["x", "residual"]


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_rows_of_any_rank_are_tiled_alike(rank):
    mod = tile_rows(build(Norm, False, rank), "main", 4)
    assert [type(f) for f in operators_of(mod)] == [TileRows, Norm, UntileRows]
    tvm.ir.assert_structural_equal(mod["main"].ret_ty, build(Norm, False, rank)["main"].ret_ty, True)


def test_other_operators_are_left_alone():
    before = build(Pool, False)
    tvm.ir.assert_structural_equal(tile_rows(before, "main", 4), before)
