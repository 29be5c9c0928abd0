"""Rows and products in bf16 between our operators; fp32 wherever TVM's operators or the caller look."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from operators import operators_of
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.errors import CompileError
from turbo_tvm.ops import Attention, CastRows, L2Normalize, Linear, Norm, Operator, Pool, TileRows, UntileRows
from turbo_tvm.ops.call import to_call
from turbo_tvm.ops.formats import BF16
from turbo_tvm.passes.lower_precision import lower_precision

t = TypeVar("t")
s = TypeVar("s")

PLAIN = '{"tensors": ["x", "weight", "bias"]}'
ADDED = '{"tensors": ["x", "weight", "bias", "residual"]}'
TABLES = '{"tensors": ["ids", "ids", "tables", "tables"]}'
ROWS = '{"tensors": ["x"]}'
WEIGHT = '{"tensors": ["weight"]}'
TILES = tirx.Var("t", "int64")


def test_a_small_graph():
    @I.ir_module
    class Before:
        @R.function
        def main(
            i: R.Tensor((t, 4), "int32"),
            j: R.Tensor((t, 4), "int32"),
            a: R.Tensor((9, 8), "float32"),
            b: R.Tensor((2, 8), "float32"),
            w: R.Tensor((8, 8), "float32"),
            c: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                x = R.call_dps_packed(
                    "turbo.embedding", (i, j, a, b, R.str(TABLES)), out_ty=R.Tensor((t, 4, 8), "float32")
                )
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                z = R.call_dps_packed("turbo.linear", (y, w, c, x, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(z)
            return z

    @I.ir_module
    class Expected:
        @R.function
        def main(
            i: R.Tensor((t, 4), "int32"),
            j: R.Tensor((t, 4), "int32"),
            a: R.Tensor((9, 8), "float32"),
            b: R.Tensor((2, 8), "float32"),
            w: R.Tensor((8, 8), "float32"),
            c: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                d = R.call_dps_packed("turbo.cast_weight", (a, R.str(WEIGHT)), out_ty=R.Tensor((9, 8), "uint16"))
                e = R.call_dps_packed("turbo.cast_weight", (b, R.str(WEIGHT)), out_ty=R.Tensor((2, 8), "uint16"))
                x = R.call_dps_packed(
                    "turbo.embedding", (i, j, d, e, R.str(TABLES)), out_ty=R.Tensor((t, 4, 8), "uint16")
                )
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "uint16"))
                z = R.call_dps_packed("turbo.linear", (y, w, c, x, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(z)
            return z

    lowered = lower_precision(Before, "main", BF16)
    tvm.ir.assert_structural_equal(lowered, Expected)
    tvm.ir.assert_structural_equal(lower_precision(lowered, "main", BF16), lowered)


def test_what_an_operator_reads_or_writes_stays_fp32_and_is_converted_once():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((t, 4, 8), "float32"), w: R.Tensor((8, 8), "float32"), c: R.Tensor((8,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                n = R.negative(y)
                z = R.call_dps_packed("turbo.linear", (n, w, c, y, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "float32"))
                u = R.call_dps_packed("turbo.linear", (n, w, c, z, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(u)
            return u

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((t, 4, 8), "float32"), w: R.Tensor((8, 8), "float32"), c: R.Tensor((8,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.call_dps_packed("turbo.cast_rows", (x, R.str(ROWS)), out_ty=R.Tensor((t, 4, 8), "uint16"))
                y = R.call_dps_packed("turbo.linear", (h, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                n = R.negative(y)
                g = R.call_dps_packed("turbo.cast_rows", (n, R.str(ROWS)), out_ty=R.Tensor((t, 4, 8), "uint16"))
                z = R.call_dps_packed("turbo.linear", (g, w, c, y, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "uint16"))
                u = R.call_dps_packed("turbo.linear", (g, w, c, z, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(u)
            return u

    tvm.ir.assert_structural_equal(lower_precision(Before, "main", BF16), Expected)


def test_rows_that_leave_their_tiles_stay_fp32():
    """As in the padded layout: `untile_rows` copies fp32."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((s, 8), "float32"), w: R.Tensor((8, 8), "float32"), c: R.Tensor((8,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed(
                    "turbo.tile_rows", (x, R.str(ROWS)), out_ty=R.Tensor(((s + 3) // 4, 4, 8), "float32")
                )
                z = R.call_dps_packed(
                    "turbo.linear", (y, w, c, R.str(PLAIN)), out_ty=R.Tensor(((s + 3) // 4, 4, 8), "float32")
                )
                u = R.call_dps_packed("turbo.untile_rows", (z, R.str(ROWS)), out_ty=R.Tensor((s, 8), "float32"))
                R.output(u)
            return u

    found = lowered_types(Before)
    assert found == [
        (TileRows, "float32"),
        (CastRows, "uint16"),
        (Linear, "float32"),
        (UntileRows, "float32"),
    ]


def lowered_types(mod: tvm.IRModule) -> list[tuple[type[Operator], str]]:
    return [(type(f), str(f.out.dtype)) for f in operators_of(lower_precision(mod, "main", BF16))]


def rows(columns: int) -> relax.TensorType:
    return relax.TensorType((TILES, 4, columns), "float32")


def weight(name: str, *shape: int) -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, "float32"))


def chain(params: list[relax.Var], *steps) -> tvm.IRModule:
    """Operators in a row; a step makes one from what there is so far, and the last is returned."""
    bb = relax.BlockBuilder()
    with bb.function("main", params, attrs={"num_input": 1}):
        with bb.dataflow():
            values = list(params)
            for step in steps:
                values.append(bb.emit(step(*values)))
            out = bb.emit_output(values[-1])
        bb.emit_func_output(out)
    return bb.finalize()


def product(x: relax.Var, w: relax.Var, bias: relax.Var) -> relax.Call:
    return to_call(Linear(x=x, weight=w, bias=bias, out=rows(int(w.ty.shape.values[0]))))


def attend(x: relax.Var, query_tiles: relax.Var, bias: relax.Var, head_dim: int = 4) -> relax.Call:
    attention = Attention(
        q=x,
        k=x,
        v=x,
        query_tiles=query_tiles,
        position_bias=bias,
        heads=2,
        head_dim=head_dim,
        scale=0.5,
        max_length=24,
        first_columns=(0, 0, 0),
        out=rows(2 * head_dim),
    )
    return to_call(attention)


QUERY_TILES = relax.Var("query_tiles", relax.TensorType((tirx.Var("n", "int64"), 3), "int32"))
CU_SEQLENS = relax.Var("cu_seqlens", relax.TensorType((tirx.Var("n", "int64"),), "int32"))


def test_attention_reads_bf16_and_keeps_its_bias():
    params = [relax.Var("x", rows(8)), QUERY_TILES, weight("bias", 2, 47), weight("w", 8, 8), weight("c", 8)]
    mod = chain(
        params,
        lambda *v: attend(v[0], v[1], v[2]),
        lambda *v: product(v[5], v[3], v[4]),
    )
    assert lowered_types(mod) == [(CastRows, "uint16"), (Attention, "uint16"), (Linear, "float32")]
    (found,) = operators_of(lower_precision(mod, "main", BF16), Attention)
    dtypes = [str(x.ty.dtype) for x in found.tensors]
    assert dtypes == ["uint16", "uint16", "uint16", "int32", "float32"]


def test_norms_write_bf16_and_read_either_and_pooled_rows_are_fp32():
    params = [relax.Var("x", rows(8)), weight("gamma", 8), weight("w", 8, 8), weight("c", 8)]
    mod = chain(
        params,
        lambda *v: to_call(Norm(x=v[0], gamma=v[1], beta=v[1], eps=1e-5, out=rows(8))),
        lambda *v: to_call(Pool(x=v[4], cu_seqlens=CU_SEQLENS, mode="mean", out=rows(8))),
        lambda *v: product(v[5], v[2], v[3]),
        lambda *v: to_call(L2Normalize(x=v[6], eps=1e-12, out=rows(8))),
    )
    assert lowered_types(mod) == [
        (Norm, "uint16"),
        (Pool, "float32"),
        (CastRows, "uint16"),
        (Linear, "uint16"),
        (L2Normalize, "float32"),
    ]


def test_a_product_of_an_odd_width_is_refused():
    mod = chain([relax.Var("x", rows(7)), weight("w", 8, 7), weight("c", 8)], product)
    with pytest.raises(CompileError, match="a product's width of 7 is odd: compile with precision='fp32'"):
        lower_precision(mod, "main", BF16)


def test_a_head_of_an_odd_width_is_refused():
    params = [relax.Var("x", rows(14)), QUERY_TILES, weight("bias", 2, 47)]
    mod = chain(params, lambda *v: attend(v[0], v[1], v[2], head_dim=7))
    with pytest.raises(CompileError, match="an attention head's width of 7 is odd"):
        lower_precision(mod, "main", BF16)
