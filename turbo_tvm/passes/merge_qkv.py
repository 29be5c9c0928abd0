"""Merge the projections of query, key and value into one product.

    q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv, bv); attention(q, k, v, ...)
        --> qkv = linear(x, concat(wq, wk, wv), concat(bq, bk, bv)); attention(qkv, qkv, qkv, ...)

    q = rotary(linear(x, wq), ids, table); k = rotary(linear(x, wk), ids, table); v = linear(x, wv)
        --> qkv = rotary(linear(x, concat(wq, wk, wv)), ids, table)

with each operand's first column in `first_columns`. Left alone when the three do not read the same
rows, carry an activation, or have other readers; keys and values may be narrower than queries.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import ir, relax

from turbo_tvm.ops import Attention, Linear, Rotary
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.ops.rotary import joined_spans
from turbo_tvm.passes.rewriter import Rewriter, shape_of


def merge_qkv(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Replace the three projections in front of each attention by one."""
    return _MergeQkv(mod, function).run()


class _MergeQkv(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str):
        super().__init__(mod, function)
        self._merged: dict[tuple[relax.Expr, ...], relax.Var] = {}

    def rules(self):
        return (self._merge,)

    def _merge(self, call: relax.Call) -> relax.Expr | None:
        attention = match(call, Attention)
        if attention is None:
            return None
        operands = (attention.q, attention.k, attention.v)
        turns = [match(self.definition(x), Rotary) for x in operands]
        sources = [x if turn is None else turn.x for x, turn in zip(operands, turns, strict=True)]
        found = [self._mergeable(x) for x in sources]
        linears = [linear for linear in found if linear is not None]
        if len(linears) < 3 or not all(self.used_once(x) for x in operands):
            return None
        rows = linears[0].x
        if not all(linear.x.same_as(rows) for linear in linears) or not _turn_alike(turns):
            return None
        weight = self._concat(tuple(linear.weight for linear in linears))
        bias = self._concat(tuple(linear.bias for linear in linears))
        widths = [int(shape_of(x)[-1]) for x in operands]
        total = sum(widths)
        offsets = [sum(widths[:i]) for i in range(3)]
        out = relax.TensorType((*rows.ty.shape.values[:-1], total), "float32")
        merged = self.emit(to_call(Linear(x=rows, weight=weight, bias=bias, out=out)))
        if any(turn is not None for turn in turns):
            merged = self.emit(_turned(merged, turns, offsets))
        q, k, v = (offset + own for offset, own in zip(offsets, attention.first_columns, strict=True))
        return to_call(replace(attention, q=merged, k=merged, v=merged, first_columns=(q, k, v)))

    def _concat(self, parts: tuple[relax.Expr, ...]) -> relax.Var:
        """The stacked weights; layers that share their weights share the result."""
        if parts not in self._merged:
            self._merged[parts] = self.emit(relax.op.concat(list(parts), axis=0))
        return self._merged[parts]

    def _mergeable(self, x: relax.Expr) -> Linear | None:
        """Return the product that `x` is, if nothing is fused into it and nothing else reads it."""
        linear = match(self.definition(x), Linear)
        return linear if linear is not None and linear.is_plain and self.used_once(x) else None


Turns = list[Rotary | None]


def _turn_alike(turns: Turns) -> bool:
    """Whether those operands that are turned are turned by the same table and the same positions."""
    given = [turn for turn in turns if turn is not None]
    same = all(
        turn.position_ids.same_as(given[0].position_ids) and turn.table.same_as(given[0].table) for turn in given
    )
    return same and len({turn.head_dim for turn in given}) <= 1


def _turned(merged: relax.Var, turns: Turns, offsets: list[int]) -> relax.Call:
    """The rotations of several operands as one of the rows that hold them all."""
    given = [(turn, offset) for turn, offset in zip(turns, offsets, strict=True) if turn is not None]
    first, _ = given[0]
    spans = [(column + offset, heads) for turn, offset in given for column, heads in turn.spans]
    joined = joined_spans(spans, first.head_dim)
    return to_call(replace(first, x=merged, columns=int(shape_of(merged)[-1]), spans=joined, out=merged.ty))
