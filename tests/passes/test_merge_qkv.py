"""The three projections in front of attention become one."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.passes import composite
from turbo_tvm.passes.merge_qkv import merge_qkv

t = TypeVar("t")
q = TypeVar("q")

PLAIN = '{"activation": null, "norm_eps": null, "residual": false}'
SEPARATE = '{"columns": [[8, 0], [8, 0], [8, 0]], "head_dim": 4, "heads": 2, "max_length": 16, "scale": 0.5}'
MERGED = '{"columns": [[24, 0], [24, 8], [24, 16]], "head_dim": 4, "heads": 2, "max_length": 16, "scale": 0.5}'


def test_projections_become_one():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            bounds: R.Tensor((q, 3), "int32"),
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
                    "turbo.attention", (y, k, v, bounds, R.str(SEPARATE)), out_ty=R.Tensor((t, 4, 8), "float32")
                )
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((t, 4, 8), "float32"),
            bounds: R.Tensor((q, 3), "int32"),
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
                    "turbo.attention", (y, y, y, bounds, R.str(MERGED)), out_ty=R.Tensor((t, 4, 8), "float32")
                )
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(merge_qkv(Before), Expected)


def build(layers: int = 1, *, rows_of_k: str = "x", activation: str | None = None, read_q: bool = False, tied=False):
    """`layers` attentions after each other; the options break what the pass asks for."""
    tiles, queries = tirx.Var("t", "int64"), tirx.Var("q", "int64")
    rows = relax.TensorType((tiles, 4, 8), "float32")
    x, other = relax.Var("x", rows), relax.Var("other", rows)
    bounds = relax.Var("bounds", relax.TensorType((queries, 3), "int32"))
    weights = [relax.Var(f"w{i}", relax.TensorType((8, 8), "float32")) for i in range(3)]
    biases = [relax.Var(f"b{i}", relax.TensorType((8,), "float32")) for i in range(3)]
    plain = {"activation": None, "residual": False, "norm_eps": None}
    attention = {"columns": [[8, 0]] * 3, "heads": 2, "head_dim": 4, "scale": 0.5, "max_length": 16}
    bb = relax.BlockBuilder()
    with bb.function("main", [x, other, bounds, *weights, *biases], attrs={"num_input": 3}):
        with bb.dataflow():
            rows_now = x
            for _ in range(layers):
                sources = [rows_now, other if rows_of_k == "other" else rows_now, rows_now]
                attrs = [plain | {"activation": activation}, plain, plain]
                made = [
                    bb.emit(composite.make("linear", (source, w, c), rows, **a))
                    for source, w, c, a in zip(sources, weights, biases, attrs, strict=True)
                ]
                made = [made[0]] * 3 if tied else made
                rows_now = bb.emit(composite.make("attention", [*made, bounds], rows, **attention))
            out = bb.emit_output(relax.op.add(rows_now, made[0]) if read_q else relax.op.negative(rows_now))
        bb.emit_func_output(out)
    return bb.finalize()


def count(mod: tvm.IRModule, name: str) -> int:
    bindings = [b for block in mod["main"].body.blocks for b in block.bindings]
    return sum(composite.match(b.value, name) is not None for b in bindings)


def concats(mod: tvm.IRModule) -> int:
    return mod.script().count("R.concat(")


@pytest.mark.parametrize(
    "broken", [{"rows_of_k": "other"}, {"activation": "tanh"}, {"read_q": True}], ids=["rows", "activation", "readers"]
)
def test_other_projections_are_left_alone(broken):
    before = build(**broken)
    after = merge_qkv(before)
    assert (count(after, "linear"), concats(after)) == (3, 0)
    tvm.ir.assert_structural_equal(after, before)


def test_one_projection_read_three_times_is_left_alone():
    assert concats(merge_qkv(build(tied=True))) == 0


def test_layers_with_the_same_weights_share_the_stacked_ones():
    after = merge_qkv(build(layers=2))
    assert (count(after, "linear"), concats(after)) == (2, 2)


def turned(*, table_of_k: str = "table", turn_k: bool = True):
    """Four heads of 4 for queries, two for keys and values; queries and keys are turned by position."""
    tiles, queries = tirx.Var("t", "int64"), tirx.Var("q", "int64")
    of = {name: relax.TensorType((tiles, 4, width), "float32") for name, width in zip("qkv", (16, 8, 8), strict=True)}
    x = relax.Var("x", relax.TensorType((tiles, 4, 8), "float32"))
    ids = relax.Var("position_ids", relax.TensorType((tiles, 4), "int32"))
    bounds = relax.Var("bounds", relax.TensorType((queries, 3), "int32"))
    tables = {name: relax.Var(name, relax.TensorType((16, 4), "float32")) for name in ("table", "other")}
    weights = [relax.Var("w" + n, relax.TensorType((int(ty.shape.values[2]), 8), "float32")) for n, ty in of.items()]
    biases = [relax.Var("b" + n, relax.TensorType((int(ty.shape.values[2]),), "float32")) for n, ty in of.items()]
    bb = relax.BlockBuilder()
    with bb.function("main", [x, ids, bounds, *tables.values(), *weights, *biases], attrs={"num_input": 3}):
        with bb.dataflow():
            rows = []
            for i, (name, ty) in enumerate(of.items()):
                plain = {"activation": None, "norm_eps": None, "residual": False}
                part = bb.emit(composite.make("linear", [x, weights[i], biases[i]], ty, **plain))
                if name == "q" or (name == "k" and turn_k):
                    table, width = tables[table_of_k if name == "k" else "table"], int(ty.shape.values[2])
                    spans = {"columns": width, "head_dim": 4, "spans": [[0, width // 4]]}
                    part = bb.emit(composite.make("rotary", [part, ids, table], ty, **spans))
                rows.append(part)
            attrs = {"heads": 4, "kv_heads": 2, "head_dim": 4, "scale": 0.5, "max_length": 16}
            columns = [[16, 0], [8, 0], [8, 0]]
            out = bb.emit_output(composite.make("attention", [*rows, bounds], of["q"], columns=columns, **attrs))
        bb.emit_func_output(out)
    return bb.finalize()


def calls_of(mod: tvm.IRModule, name: str) -> list[composite.Composite]:
    found = [composite.match(b.value, name) for b in merge_qkv(mod)["main"].body.blocks[0].bindings]
    return [f for f in found if f is not None]


@pytest.mark.parametrize("turn_k", [True, False])
def test_narrower_keys_and_rotations_are_merged_too(turn_k):
    mod = turned(turn_k=turn_k)
    (rotary,), (attention,) = calls_of(mod, "rotary"), calls_of(mod, "attention")
    assert rotary.attrs == {"columns": 32, "head_dim": 4, "spans": [[0, 6 if turn_k else 4]]}
    assert attention.attrs["columns"] == [[32, 0], [32, 16], [32, 24]] and attention.attrs["kv_heads"] == 2
    assert len(calls_of(mod, "linear")) == 1


def test_rotations_by_two_tables_are_left_alone():
    mod = turned(table_of_k="other")
    assert len(calls_of(mod, "rotary")) == 2 and len(calls_of(mod, "linear")) == 3
