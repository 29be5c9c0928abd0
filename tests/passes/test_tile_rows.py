"""Row tiling around the row-wise kernels of a padded graph."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.passes import composite
from turbo_tvm.passes.tile_rows import tile_rows

b = TypeVar("b")
s = TypeVar("s")

PLAIN = '{"activation": null, "norm_eps": null, "residual": false}'


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
                    "turbo.tile_rows", (flat, R.str("{}")), out_ty=R.Tensor(((b * s + 4 - 1) // 4, 4, 8), "float32")
                )
                y = R.call_dps_packed(
                    "turbo.linear",
                    (tiled, w, c, R.str(PLAIN)),
                    out_ty=R.Tensor(((b * s + 4 - 1) // 4, 4, 5), "float32"),
                )
                rows = R.call_dps_packed("turbo.untile_rows", (y, R.str("{}")), out_ty=R.Tensor((b * s, 5), "float32"))
                out = R.reshape(rows, R.shape([b, s, 5]))
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(tile_rows(Before, 4), Expected)


def build(name: str, weights: int, residual: bool, rank: int = 3, **attrs) -> tvm.IRModule:
    lead = [tirx.Var(d, "int64") for d in "bsh"[: rank - 1]]
    rows = relax.TensorType((*lead, 8), "float32")
    x, r = relax.Var("x", rows), relax.Var("r", rows)
    parameters = [relax.Var(f"w{i}", relax.TensorType((8,), "float32")) for i in range(weights)]
    tensors = [x, *parameters, r] if name == "linear" else [x, r, *parameters]
    tensors = tensors if residual else [t for t in tensors if t is not r]
    bb = relax.BlockBuilder()
    with bb.function("main", [x, r, *parameters], attrs={"num_input": 2}):
        with bb.dataflow():
            out = bb.emit_output(composite.make(name, tensors, rows, residual=residual, **attrs))
        bb.emit_func_output(out)
    return bb.finalize()


def composites(mod: tvm.IRModule) -> list[composite.Composite]:
    found = [composite.match(b.value) for block in mod["main"].body.blocks for b in block.bindings]
    return [f for f in found if f is not None]


@pytest.mark.parametrize("name, at", [("linear", (0, 3)), ("norm", (0, 1))])
def test_residuals_are_tiled_and_weights_are_not(name, at):
    found = composites(tile_rows(build(name, 2, True), 4))
    assert [f.name for f in found] == ["tile_rows", "tile_rows", name, "untile_rows"]
    tensors = found[2].tensors
    assert tuple(i for i, t in enumerate(tensors) if len(t.ty.shape.values) == 3) == at


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_rows_of_any_rank_are_tiled_alike(rank):
    mod = tile_rows(build("norm", 2, False, rank), 4)
    assert [f.name for f in composites(mod)] == ["tile_rows", "norm", "untile_rows"]
    tvm.ir.assert_structural_equal(mod["main"].ret_ty, build("norm", 2, False, rank)["main"].ret_ty, True)


def test_other_composites_are_left_alone():
    before = build("pool", 1, False)
    tvm.ir.assert_structural_equal(tile_rows(before, 4), before)
