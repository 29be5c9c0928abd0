"""Rows and products in bf16 between composites; fp32 wherever TVM's operators or the caller look."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.errors import CompileError
from turbo_tvm.passes import composite
from turbo_tvm.passes.lower_precision import lower_precision

t = TypeVar("t")
s = TypeVar("s")

PLAIN = '{"activation": null, "norm_eps": null, "residual": false}'
ADDED = '{"activation": null, "norm_eps": null, "residual": true}'
TABLES = '{"norm_eps": null, "tables": 2}'
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
                d = R.call_dps_packed(
                    "turbo.cast_weight", (a, R.str('{"shape": [9, 8]}')), out_ty=R.Tensor((9, 8), "uint16")
                )
                e = R.call_dps_packed(
                    "turbo.cast_weight", (b, R.str('{"shape": [2, 8]}')), out_ty=R.Tensor((2, 8), "uint16")
                )
                x = R.call_dps_packed(
                    "turbo.embedding", (i, j, d, e, R.str(TABLES)), out_ty=R.Tensor((t, 4, 8), "uint16")
                )
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "uint16"))
                z = R.call_dps_packed("turbo.linear", (y, w, c, x, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(z)
            return z

    lowered = lower_precision(Before)
    tvm.ir.assert_structural_equal(lowered, Expected)
    tvm.ir.assert_structural_equal(lower_precision(lowered), lowered)


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
                h = R.call_dps_packed("turbo.cast_rows", (x, R.str("{}")), out_ty=R.Tensor((t, 4, 8), "uint16"))
                y = R.call_dps_packed("turbo.linear", (h, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                n = R.negative(y)
                g = R.call_dps_packed("turbo.cast_rows", (n, R.str("{}")), out_ty=R.Tensor((t, 4, 8), "uint16"))
                z = R.call_dps_packed("turbo.linear", (g, w, c, y, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "uint16"))
                u = R.call_dps_packed("turbo.linear", (g, w, c, z, R.str(ADDED)), out_ty=R.Tensor((t, 4, 8), "float32"))
                R.output(u)
            return u

    tvm.ir.assert_structural_equal(lower_precision(Before), Expected)


def test_rows_that_leave_their_tiles_stay_fp32():
    """As in the padded layout: `untile_rows` copies fp32."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((s, 8), "float32"), w: R.Tensor((8, 8), "float32"), c: R.Tensor((8,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed(
                    "turbo.tile_rows", (x, R.str("{}")), out_ty=R.Tensor(((s + 3) // 4, 4, 8), "float32")
                )
                z = R.call_dps_packed(
                    "turbo.linear", (y, w, c, R.str(PLAIN)), out_ty=R.Tensor(((s + 3) // 4, 4, 8), "float32")
                )
                u = R.call_dps_packed("turbo.untile_rows", (z, R.str("{}")), out_ty=R.Tensor((s, 8), "float32"))
                R.output(u)
            return u

    found = lowered_types(Before)
    assert found == [
        ("tile_rows", "float32"),
        ("cast_rows", "uint16"),
        ("linear", "float32"),
        ("untile_rows", "float32"),
    ]


def lowered_types(mod: tvm.IRModule) -> list[tuple[str, str]]:
    bindings = [b for block in lower_precision(mod)["main"].body.blocks for b in block.bindings]
    return [(f.name, str(b.value.ty_args[0].dtype)) for b in bindings if (f := composite.match(b.value)) is not None]


def rows(columns: int) -> relax.TensorType:
    return relax.TensorType((TILES, 4, columns), "float32")


def weight(name: str, *shape: int) -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, "float32"))


def chain(params: list[relax.Var], *steps) -> tvm.IRModule:
    """Composites in a row; a step makes one from what there is so far, and the last is returned."""
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
    attrs = {"activation": None, "norm_eps": None, "residual": False}
    return composite.make("linear", [x, w, bias], rows(int(w.ty.shape.values[0])), **attrs)


def attend(q, k, v, bounds, bias, head_dim: int = 4) -> relax.Call:
    attrs = {"heads": 2, "head_dim": head_dim, "scale": 0.5, "max_length": 24, "columns": [[2 * head_dim, 0]] * 3}
    return composite.make("attention", [q, k, v, bounds, bias], rows(2 * head_dim), **attrs)


BOUNDS = relax.Var("query_tiles", relax.TensorType((tirx.Var("n", "int64"), 3), "int32"))


def test_attention_reads_bf16_and_keeps_its_bias():
    params = [relax.Var("x", rows(8)), BOUNDS, weight("bias", 2, 47), weight("w", 8, 8), weight("c", 8)]
    mod = chain(
        params,
        lambda *v: attend(v[0], v[0], v[0], v[1], v[2]),
        lambda *v: product(v[5], v[3], v[4]),
    )
    assert lowered_types(mod) == [("cast_rows", "uint16"), ("attention", "uint16"), ("linear", "float32")]
    (found,) = [
        b for b in lower_precision(mod)["main"].body.blocks[0].bindings if composite.match(b.value, "attention")
    ]
    dtypes = [str(x.ty.dtype) for x in composite.match(found.value).tensors]
    assert dtypes == ["uint16", "uint16", "uint16", "int32", "float32"]


def test_norms_write_bf16_and_read_either_and_pooled_rows_are_fp32():
    params = [relax.Var("x", rows(8)), weight("gamma", 8), weight("w", 8, 8), weight("c", 8)]
    mod = chain(
        params,
        lambda *v: composite.make("norm", [v[0], v[1], v[1]], rows(8), eps=1e-5, residual=False),
        lambda *v: composite.make("pool", [v[4], BOUNDS], rows(8), mode="mean"),
        lambda *v: product(v[5], v[2], v[3]),
        lambda *v: composite.make("normalize", [v[6]], rows(8), eps=1e-12),
    )
    assert lowered_types(mod) == [
        ("norm", "uint16"),
        ("pool", "float32"),
        ("cast_rows", "uint16"),
        ("linear", "uint16"),
        ("normalize", "float32"),
    ]


def test_a_product_of_an_odd_width_is_refused():
    mod = chain([relax.Var("x", rows(7)), weight("w", 8, 7), weight("c", 8)], product)
    with pytest.raises(CompileError, match="a product's width of 7 is odd: compile with precision='fp32'"):
        lower_precision(mod)


def test_a_head_of_an_odd_width_is_refused():
    params = [relax.Var("x", rows(14)), BOUNDS, weight("bias", 2, 47)]
    mod = chain(params, lambda *v: attend(v[0], v[0], v[0], v[1], v[2], head_dim=7))
    with pytest.raises(CompileError, match="an attention head's width of 7 is odd"):
        lower_precision(mod)
