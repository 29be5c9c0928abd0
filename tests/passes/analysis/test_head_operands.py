"""Queries, keys and values in many spellings: which columns of which rows they are, and how they were turned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax, tirx

from turbo_tvm.passes.analysis.evaluate import evaluate
from turbo_tvm.passes.analysis.head_operands import HeadOperand, HeadOperands
from turbo_tvm.passes.canonicalize import canonicalize
from turbo_tvm.passes.rewriter import Rewriter

HEADS, HEAD_DIM, POSITIONS = 4, 6, 20
WIDTH = HEADS * HEAD_DIM
FREQUENCIES = (1 / 7 ** (np.arange(HEAD_DIM // 2) / 3)).astype("float32")
Emit = Callable[[relax.Expr], relax.Var]


class Found(Rewriter):
    """Finds the operand that the module's function returns."""

    operand: HeadOperand | None = None

    def rules(self):
        return (lambda call: None,)

    def find(self) -> HeadOperand | None:
        b, s, *_ = self.func.params[0].ty.shape.values
        for block in self.func.body.blocks:
            for binding in block.bindings:
                self._visit(binding)
        ids = next(p for p in self.func.params if p.name == "position_ids")
        out = self.func.body.body
        while out not in self._new and out in self.func_bindings:
            out = self.func_bindings[out]
        return HeadOperands(self, (b, s), POSITIONS, ids).find(self._new[out])

    @property
    def func_bindings(self):
        return {b.var: b.value for block in self.func.body.blocks for b in block.bindings}


def find(spelling: Callable, width: int = 3 * WIDTH) -> tuple[HeadOperand | None, np.ndarray | None]:
    """The operand of `spelling(emit, x, cos, sin, (b, s))`, and its table's values."""
    b, s = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    x = relax.Var("x", relax.TensorType((b, s, width), "float32"))
    ids = relax.Var("position_ids", relax.TensorType((b, s), "int64"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, ids], attrs={"num_input": 2}):
        with bb.dataflow():
            wide = bb.emit(relax.op.astype(bb.emit(relax.op.expand_dims(ids, [2])), "float32"))
            half = bb.emit(relax.op.multiply(wide, relax.const(FREQUENCIES)))
            angles = bb.emit(relax.op.concat([half, half], axis=-1))
            tables = bb.emit(relax.op.cos(angles)), bb.emit(relax.op.sin(angles))
            out = bb.emit_output(spelling(bb.emit, x, *tables, (b, s)))
        bb.emit_func_output(out)
    rewriter = Found(canonicalize(bb.finalize(), "main"), "main")
    with rewriter.builder.function("main", list(rewriter.func.params)):
        with rewriter.builder.dataflow():
            operand = rewriter.find()
            table = None
            if operand is not None and operand.table is not None:
                table = evaluate(rewriter, operand.table, {}, lambda param: None)
            last = rewriter.builder.emit_output(rewriter.func.params[0])
        rewriter.builder.emit_func_output(last)
    return operand, table


def split_along_columns(emit, x, cos, sin, tokens):
    part = emit(relax.TupleGetItem(emit(relax.op.split(x, 3, axis=2)), 1))
    return relax.op.reshape(part, (*tokens, HEADS, HEAD_DIM))


def unbound(emit, x, cos, sin, tokens):
    parts = emit(relax.op.reshape(x, (*tokens, 3, HEADS, HEAD_DIM)))
    return relax.op.squeeze(emit(relax.op.strided_slice(parts, [2], [1], [2])), [2])


def last_of_three_by_heads_first(emit, x, cos, sin, tokens):
    """Every head has its query, key and value side by side: no span of whole heads."""
    parts = emit(relax.op.reshape(x, (*tokens, HEADS, 3, HEAD_DIM)))
    return relax.op.squeeze(emit(relax.op.strided_slice(parts, [3], [1], [2])), [3])


def other_tokens(emit, x, cos, sin, tokens):
    """Rows in another order."""
    b, s = tokens
    turned = emit(relax.op.reshape(emit(relax.op.permute_dims(x, [0, 2, 1])), (b, s, 3 * WIDTH)))
    return split_along_columns(emit, turned, cos, sin, tokens)


@pytest.mark.parametrize("spelling", [split_along_columns, unbound])
def test_columns_of_merged_rows(spelling):
    operand, _ = find(spelling)
    assert operand is not None and operand.rows.name == "x" and operand.table is None
    assert (operand.width, operand.first_column, operand.heads, operand.head_dim) == (72, 24, HEADS, HEAD_DIM)


@pytest.mark.parametrize("spelling", [last_of_three_by_heads_first, other_tokens])
def test_other_orders_are_left_alone(spelling):
    assert find(spelling)[0] is None


def _groups(emit, heads, expand):
    """(b, 2, s, d) to (b, 4, s, d), each head twice."""
    if not expand:
        return relax.op.repeat(heads, 2, axis=1)
    b, count, s, d = heads.ty.shape.values
    wide = emit(relax.op.broadcast_to(emit(relax.op.expand_dims(heads, [2])), (b, count, 2, s, d)))
    return relax.op.reshape(wide, (b, HEADS, s, HEAD_DIM))


@pytest.mark.parametrize("expand", [True, False])
def test_heads_that_are_shared(expand):
    def shared(emit, x, cos, sin, tokens):
        heads = emit(relax.op.permute_dims(emit(relax.op.reshape(x, (*tokens, 2, HEAD_DIM))), [0, 2, 1, 3]))
        return relax.op.permute_dims(emit(_groups(emit, heads, expand)), [0, 2, 1, 3])

    operand, _ = find(shared, width=2 * HEAD_DIM)
    assert operand is not None and (operand.first_column, operand.heads) == (0, 2)


def test_heads_that_alternate_are_left_alone():
    def tiled(emit, x, cos, sin, tokens):
        b, s = tokens
        heads = emit(relax.op.reshape(x, (b, s, 1, 2, HEAD_DIM)))
        return relax.op.reshape(emit(relax.op.broadcast_to(heads, (b, s, 2, 2, HEAD_DIM))), (b, s, HEADS, HEAD_DIM))

    assert find(tiled, width=2 * HEAD_DIM)[0] is None


def rotary(order: str = "plain", heads_first: bool = True, backwards: bool = False) -> Callable:
    """x cos + rotate_half(x) sin; order: of the factors and of the terms."""

    def spelling(emit, x, cos, sin, tokens):
        heads = emit(relax.op.reshape(x, (*tokens, HEADS, HEAD_DIM)))
        if heads_first:
            heads = emit(relax.op.permute_dims(heads, [0, 2, 1, 3]))
        cos, sin = (emit(relax.op.expand_dims(t, [1 if heads_first else 2])) for t in (cos, sin))
        half = HEAD_DIM // 2
        if order == "split":  # as ONNX graphs have it
            parts = emit(relax.op.split(heads, 2, axis=3))
            low, high = (emit(relax.TupleGetItem(parts, i)) for i in (0, 1))
        else:
            low = emit(relax.op.strided_slice(heads, [3], [0], [half]))
            high = emit(relax.op.strided_slice(heads, [3], [half], [2**63 - 1]))
        low, high = (low, emit(relax.op.negative(high))) if not backwards else (emit(relax.op.negative(low)), high)
        rotated = emit(relax.op.concat([high, low], axis=-1))
        terms = [emit(relax.op.multiply(heads, cos)), emit(relax.op.multiply(rotated, sin))]
        if order == "swapped":
            terms = [emit(relax.op.multiply(sin, rotated)), emit(relax.op.multiply(cos, heads))]
        total = relax.op.add(*terms)
        return relax.op.permute_dims(emit(total), [0, 2, 1, 3]) if heads_first else total

    return spelling


@pytest.mark.parametrize("order", ["plain", "swapped", "split"])
@pytest.mark.parametrize("heads_first", [True, False])
def test_rotary_positions_in_any_spelling(order, heads_first):
    operand, table = find(rotary(order, heads_first), width=WIDTH)
    assert operand is not None and operand.rows.name == "x" and table is not None
    assert (operand.first_column, operand.heads) == (0, HEADS)
    angles = np.arange(POSITIONS)[:, None] * FREQUENCIES
    np.testing.assert_allclose(table, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-6)


def test_a_rotation_the_other_way_is_left_alone():
    assert find(rotary(backwards=True), width=WIDTH)[0] is None


def test_angles_that_depend_on_more_than_positions_are_left_alone():
    def spelling(emit, x, cos, sin, tokens):
        scale = emit(relax.op.mean(x, axis=2, keepdims=True))
        return rotary()(emit, x, emit(relax.op.multiply(cos, scale)), sin, tokens)

    assert find(spelling, width=WIDTH)[0] is None
