"""The packing of weights stands in front of every product."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.passes import composite
from turbo_tvm.passes.pack_weights import pack_weights

t = TypeVar("t")

PLAIN = '{"activation": null, "norm_eps": null, "residual": false}'


@I.ir_module
class Tied:
    """Two products with the same weight and different biases; the second has a residual."""

    @R.function
    def main(
        x: R.Tensor((t, 4, 10), "float32"),
        w: R.Tensor((10, 10), "float32"),
        c: R.Tensor((10,), "float32"),
        d: R.Tensor((10,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32"))
            z = R.call_dps_packed(
                "turbo.linear",
                (y, w, d, x, R.str('{"activation": null, "norm_eps": null, "residual": true}')),
                out_ty=R.Tensor((t, 4, 10), "float32"),
            )
            R.output(z)
        return z


def test_panels_are_rounded_up_and_shared_weights_packed_once():
    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((t, 4, 10), "float32"),
            w: R.Tensor((10, 10), "float32"),
            c: R.Tensor((10,), "float32"),
            d: R.Tensor((10,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                panels = R.call_dps_packed(
                    "turbo.pack_weight", (w, R.str('{"k": 10, "n": 10}')), out_ty=R.Tensor((2, 10, 8), "float32")
                )
                e = R.call_dps_packed("turbo.pack_bias", (c, R.str('{"n": 10}')), out_ty=R.Tensor((16,), "float32"))
                y = R.call_dps_packed(
                    "turbo.linear", (x, panels, e, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32")
                )
                f = R.call_dps_packed("turbo.pack_bias", (d, R.str('{"n": 10}')), out_ty=R.Tensor((16,), "float32"))
                z = R.call_dps_packed(
                    "turbo.linear",
                    (y, panels, f, x, R.str('{"activation": null, "norm_eps": null, "residual": true}')),
                    out_ty=R.Tensor((t, 4, 10), "float32"),
                )
                R.output(z)
            return z

    tvm.ir.assert_structural_equal(pack_weights(Tied, 8), Expected)


def test_products_of_bf16_get_pairs():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((t, 4, 10), "uint16"),
            r: R.Tensor((t, 4, 10), "float32"),
            w: R.Tensor((10, 10), "float32"),
            c: R.Tensor((10,), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32"))
                z = R.call_dps_packed("turbo.linear", (y, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32"))
                R.output(z)
            return z

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((t, 4, 10), "uint16"),
            r: R.Tensor((t, 4, 10), "float32"),
            w: R.Tensor((10, 10), "float32"),
            c: R.Tensor((10,), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                pairs = R.call_dps_packed(
                    "turbo.pack_weight",
                    (w, R.str('{"k": 10, "n": 10, "pairs": true}')),
                    out_ty=R.Tensor((2, 5, 8), "int32"),
                )
                e = R.call_dps_packed("turbo.pack_bias", (c, R.str('{"n": 10}')), out_ty=R.Tensor((16,), "float32"))
                y = R.call_dps_packed(
                    "turbo.linear", (x, pairs, e, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32")
                )
                panels = R.call_dps_packed(
                    "turbo.pack_weight", (w, R.str('{"k": 10, "n": 10}')), out_ty=R.Tensor((2, 10, 8), "float32")
                )
                z = R.call_dps_packed(
                    "turbo.linear", (y, panels, e, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32")
                )
                R.output(z)
            return z

    packed = pack_weights(Before, 8)
    tvm.ir.assert_structural_equal(packed, Expected)
    tvm.ir.assert_structural_equal(pack_weights(packed, 8), packed)


def test_packed_weights_are_left_alone():
    once = pack_weights(Tied, 8)
    tvm.ir.assert_structural_equal(pack_weights(once, 8), once)


def test_other_composites_are_left_alone():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((t, 4, 8), "float32"), c: R.Tensor((8,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed(
                    "turbo.norm",
                    (x, c, c, R.str('{"eps": 1e-05, "residual": false}')),
                    out_ty=R.Tensor((t, 4, 8), "float32"),
                )
                R.output(y)
            return y

    tvm.ir.assert_structural_equal(pack_weights(Before, 8), Before)


@pytest.mark.parametrize(("rows", "stored", "size"), [("float32", "float32", 6 * 48), ("uint16", "int32", 3 * 48)])
def test_tables_over_distances_get_the_lanes_past_the_last_query(rows, stored, size):
    """21 columns and 7 more lanes of a tile of 8, in an odd number of cache lines of 16; bf16 in pairs."""
    types = [((tirx.Var("t", "int64"), 4, 6), rows), ((tirx.Var("n", "int64"), 3), "int32"), ((1, 6, 21), "float32")]
    x, tiles, table = (relax.Var(n, relax.TensorType(*ty)) for n, ty in zip("xqd", types, strict=True))
    attrs = {"head_dim": 6, "heads": 1, "key_distances": True}
    bb = relax.BlockBuilder()
    with bb.function("main", [x, tiles, table], attrs={"num_input": 2}):
        with bb.dataflow():
            out = bb.emit_output(composite.make("attention", [x, x, x, tiles, table], x.ty, **attrs))
        bb.emit_func_output(out)
    packing, attention = (b.value for b in pack_weights(bb.finalize(), col_tile=8)["main"].body.blocks[0].bindings)
    assert composite.match(packing, "pack_distances").attrs["width"] == 48
    packed = composite.match(attention, "attention").tensors[4]
    assert (str(packed.ty.dtype), [int(d) for d in packed.ty.shape.values]) == (stored, [size])
