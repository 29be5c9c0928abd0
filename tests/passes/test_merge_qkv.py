"""The three projections in front of attention become one."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from operators import operators_of
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Attention, Linear, Rotary
from turbo_tvm.ops.call import to_call
from turbo_tvm.passes.merge_qkv import merge_qkv

t = TypeVar("t")
q = TypeVar("q")

PLAIN = '{"tensors": ["x", "weight", "bias"]}'
HEADS = '"head_dim": 4, "heads": 2, "max_length": 16, "scale": 0.5, "tensors": ["q", "k", "v", "query_tiles"]'
SEPARATE = f'{{"first_columns": [0, 0, 0], {HEADS}}}'
MERGED = f'{{"first_columns": [0, 8, 16], {HEADS}}}'


def test_projections_become_one():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            query_tiles: R.Tensor((q, 3), "int32"),
            wq: R.Tensor((8, 8), "float32"),
            bq: R.Tensor((8,), "float32"),
            wk: R.Tensor((8, 8), "float32"),
            bk: R.Tensor((8,), "float32"),
            wv: R.Tensor((8, 8), "float32"),
            bv: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                y = R.call_dps_packed("turbo.linear", (x, wq, bq, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                k = R.call_dps_packed("turbo.linear", (x, wk, bk, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                v = R.call_dps_packed("turbo.linear", (x, wv, bv, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 8), "float32"))
                out = R.call_dps_packed(
                    "turbo.attention", (y, k, v, query_tiles, R.str(SEPARATE)), out_ty=R.Tensor((t, 4, 8), "float32")
                )
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            query_tiles: R.Tensor((q, 3), "int32"),
            wq: R.Tensor((8, 8), "float32"),
            bq: R.Tensor((8,), "float32"),
            wk: R.Tensor((8, 8), "float32"),
            bk: R.Tensor((8,), "float32"),
            wv: R.Tensor((8, 8), "float32"),
            bv: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                w = R.concat((wq, wk, wv), axis=0)
                c = R.concat((bq, bk, bv), axis=0)
                y = R.call_dps_packed("turbo.linear", (x, w, c, R.str(PLAIN)), out_ty=R.Tensor((t, 4, 24), "float32"))
                out = R.call_dps_packed(
                    "turbo.attention", (y, y, y, query_tiles, R.str(MERGED)), out_ty=R.Tensor((t, 4, 8), "float32")
                )
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(merge_qkv(Before, "main"), Expected)


def build(layers: int = 1, *, rows_of_k: str = "x", activation: str | None = None, read_q: bool = False, tied=False):
    """`layers` attentions after each other; the options break what the pass asks for."""
    tiles, queries = tirx.Var("t", "int64"), tirx.Var("q", "int64")
    rows = relax.TensorType((tiles, 4, 8), "float32")
    x, other = relax.Var("x", rows), relax.Var("other", rows)
    query_tiles = relax.Var("query_tiles", relax.TensorType((queries, 3), "int32"))
    weights = [relax.Var(f"w{i}", relax.TensorType((8, 8), "float32")) for i in range(3)]
    biases = [relax.Var(f"b{i}", relax.TensorType((8,), "float32")) for i in range(3)]
    sizes = {"heads": 2, "head_dim": 4, "scale": 0.5, "max_length": 16, "first_columns": (0, 0, 0)}
    bb = relax.BlockBuilder()
    with bb.function("main", [x, other, query_tiles, *weights, *biases], attrs={"num_input": 3}):
        with bb.dataflow():
            rows_now = x
            for _ in range(layers):
                sources = [rows_now, other if rows_of_k == "other" else rows_now, rows_now]
                made = [
                    bb.emit(to_call(Linear(x=source, weight=w, bias=c, activation=a, out=rows)))
                    for source, w, c, a in zip(sources, weights, biases, (activation, None, None), strict=True)
                ]
                q, k, v = [made[0]] * 3 if tied else made
                attention = Attention(q=q, k=k, v=v, query_tiles=query_tiles, out=rows, **sizes)
                rows_now = bb.emit(to_call(attention))
            out = bb.emit_output(relax.op.add(rows_now, made[0]) if read_q else relax.op.negative(rows_now))
        bb.emit_func_output(out)
    return bb.finalize()


def concats(mod: tvm.IRModule) -> int:
    return mod.script().count("R.concat(")


@pytest.mark.parametrize(
    "broken", [{"rows_of_k": "other"}, {"activation": "tanh"}, {"read_q": True}], ids=["rows", "activation", "readers"]
)
def test_other_projections_are_left_alone(broken):
    before = build(**broken)
    after = merge_qkv(before, "main")
    assert (len(operators_of(after, Linear)), concats(after)) == (3, 0)
    tvm.ir.assert_structural_equal(after, before)


def test_one_projection_read_three_times_is_left_alone():
    assert concats(merge_qkv(build(tied=True), "main")) == 0


def test_layers_with_the_same_weights_share_the_stacked_ones():
    after = merge_qkv(build(layers=2), "main")
    assert (len(operators_of(after, Linear)), concats(after)) == (2, 2)


def turned(*, table_of_k: str = "table", turn_k: bool = True):
    """Four heads of 4 for queries, two for keys and values; queries and keys are turned by position."""
    tiles, queries = tirx.Var("t", "int64"), tirx.Var("q", "int64")
    of = {name: relax.TensorType((tiles, 4, width), "float32") for name, width in zip("qkv", (16, 8, 8), strict=True)}
    x = relax.Var("x", relax.TensorType((tiles, 4, 8), "float32"))
    ids = relax.Var("position_ids", relax.TensorType((tiles, 4), "int32"))
    query_tiles = relax.Var("query_tiles", relax.TensorType((queries, 3), "int32"))
    tables = {name: relax.Var(name, relax.TensorType((16, 4), "float32")) for name in ("table", "other")}
    weights = [relax.Var("w" + n, relax.TensorType((int(ty.shape.values[2]), 8), "float32")) for n, ty in of.items()]
    biases = [relax.Var("b" + n, relax.TensorType((int(ty.shape.values[2]),), "float32")) for n, ty in of.items()]
    bb = relax.BlockBuilder()
    with bb.function("main", [x, ids, query_tiles, *tables.values(), *weights, *biases], attrs={"num_input": 3}):
        with bb.dataflow():
            rows = []
            for i, (name, ty) in enumerate(of.items()):
                part = bb.emit(to_call(Linear(x=x, weight=weights[i], bias=biases[i], out=ty)))
                if name == "q" or (name == "k" and turn_k):
                    table, width = tables[table_of_k if name == "k" else "table"], int(ty.shape.values[2])
                    heads = {"columns": width, "head_dim": 4, "spans": ((0, width // 4),)}
                    part = bb.emit(to_call(Rotary(x=part, position_ids=ids, table=table, out=ty, **heads)))
                rows.append(part)
            sizes = {"heads": 4, "kv_heads": 2, "head_dim": 4, "scale": 0.5, "max_length": 16}
            operands = dict(zip("qkv", rows, strict=True)) | {"query_tiles": query_tiles, "out": of["q"]}
            out = bb.emit_output(to_call(Attention(**operands, first_columns=(0, 0, 0), **sizes)))
        bb.emit_func_output(out)
    return bb.finalize()


@pytest.mark.parametrize("turn_k", [True, False])
def test_narrower_keys_and_rotations_are_merged_too(turn_k):
    mod = merge_qkv(turned(turn_k=turn_k), "main")
    (rotary,), (attention,) = operators_of(mod, Rotary), operators_of(mod, Attention)
    assert rotary.attributes() == {"columns": 32, "head_dim": 4, "spans": ((0, 6 if turn_k else 4),)}
    assert attention.operand_columns == ((32, 0), (32, 16), (32, 24)) and attention.kv_heads == 2
    assert len(operators_of(mod, Linear)) == 1


def test_rotations_by_two_tables_are_left_alone():
    mod = merge_qkv(turned(table_of_k="other"), "main")
    assert len(operators_of(mod, Rotary)) == 2 and len(operators_of(mod, Linear)) == 3
