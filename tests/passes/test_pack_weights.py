"""The packing of weights stands in front of every product."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from operators import operators_of
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Attention, PackBias, PackDistances, PackWeight
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.passes.pack_weights import pack_weights

t = TypeVar("t")

PLAIN = '{"tensors": ["x", "weight", "bias"]}'
ADDED = '{"tensors": ["x", "weight", "bias", "residual"]}'
WEIGHT = '{"tensors": ["weight"]}'
BIAS = '{"tensors": ["bias"]}'


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
                (y, w, d, x, R.str(ADDED)),
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
                    "turbo.pack_weight", (w, R.str(WEIGHT)), out_ty=R.Tensor((2, 10, 8), "float32")
                )
                e = R.call_dps_packed("turbo.pack_bias", (c, R.str(BIAS)), out_ty=R.Tensor((16,), "float32"))
                y = R.call_dps_packed(
                    "turbo.linear", (x, panels, e, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32")
                )
                f = R.call_dps_packed("turbo.pack_bias", (d, R.str(BIAS)), out_ty=R.Tensor((16,), "float32"))
                z = R.call_dps_packed(
                    "turbo.linear",
                    (y, panels, f, x, R.str(ADDED)),
                    out_ty=R.Tensor((t, 4, 10), "float32"),
                )
                R.output(z)
            return z

    packed = pack_weights(Tied, "main", 8)
    tvm.ir.assert_structural_equal(packed, Expected)
    assert [(p.k, p.n, p.in_pairs) for p in operators_of(packed, PackWeight)] == [(10, 10, False)]
    assert [p.n for p in operators_of(packed, PackBias)] == [10, 10]


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
                    (w, R.str(WEIGHT)),
                    out_ty=R.Tensor((2, 5, 8), "int32"),
                )
                e = R.call_dps_packed("turbo.pack_bias", (c, R.str(BIAS)), out_ty=R.Tensor((16,), "float32"))
                y = R.call_dps_packed(
                    "turbo.linear", (x, pairs, e, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32")
                )
                panels = R.call_dps_packed(
                    "turbo.pack_weight", (w, R.str(WEIGHT)), out_ty=R.Tensor((2, 10, 8), "float32")
                )
                z = R.call_dps_packed(
                    "turbo.linear", (y, panels, e, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 10), "float32")
                )
                R.output(z)
            return z

    packed = pack_weights(Before, "main", 8)
    tvm.ir.assert_structural_equal(packed, Expected)
    tvm.ir.assert_structural_equal(pack_weights(packed, "main", 8), packed)
    assert [(p.k, p.n, p.in_pairs) for p in operators_of(packed, PackWeight)] == [(10, 10, True), (10, 10, False)]


def test_packed_weights_are_left_alone():
    once = pack_weights(Tied, "main", 8)
    tvm.ir.assert_structural_equal(pack_weights(once, "main", 8), once)


def test_other_operators_are_left_alone():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((t, 4, 8), "float32"), c: R.Tensor((8,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed(
                    "turbo.norm",
                    (x, c, c, R.str('{"eps": 1e-05, "tensors": ["x", "gamma", "beta"]}')),
                    out_ty=R.Tensor((t, 4, 8), "float32"),
                )
                R.output(y)
            return y

    tvm.ir.assert_structural_equal(pack_weights(Before, "main", 8), Before)


@pytest.mark.parametrize(("rows", "stored", "size"), [("float32", "float32", 6 * 48), ("uint16", "int32", 3 * 48)])
def test_tables_over_distances_get_the_lanes_past_the_last_query(rows, stored, size):
    """21 columns and 7 more lanes of a tile of 8, in an odd number of cache lines of 16; bf16 in pairs."""
    types = [((tirx.Var("t", "int64"), 4, 6), rows), ((tirx.Var("n", "int64"), 3), "int32"), ((1, 6, 21), "float32")]
    x, tiles, table = (relax.Var(n, relax.TensorType(*ty)) for n, ty in zip("xqd", types, strict=True))
    sizes = {"head_dim": 6, "heads": 1, "scale": 1.0, "max_length": 11, "first_columns": (0, 0, 0)}
    operator = Attention(q=x, k=x, v=x, query_tiles=tiles, key_table=table, out=x.ty, **sizes)
    bb = relax.BlockBuilder()
    with bb.function("main", [x, tiles, table], attrs={"num_input": 2}):
        with bb.dataflow():
            out = bb.emit_output(to_call(operator))
        bb.emit_func_output(out)
    bindings = pack_weights(bb.finalize(), "main", col_tile=8)["main"].body.blocks[0].bindings
    packing, attention = (b.value for b in bindings)
    assert match(packing, PackDistances).row_width == 48
    packed = match(attention, Attention).key_table
    assert (str(packed.ty.dtype), [int(d) for d in packed.ty.shape.values]) == (stored, [size])
