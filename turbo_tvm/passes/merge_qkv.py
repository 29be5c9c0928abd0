"""Merge the projections of query, key and value into one product.

    q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv, bv); attention(q, k, v, ...)
        --> qkv = linear(x, concat(wq, wk, wv), concat(bq, bk, bv)); attention(qkv, qkv, qkv, ...)

    q = rotary(linear(x, wq), ids, table); k = rotary(linear(x, wk), ids, table); v = linear(x, wv)
        --> qkv = rotary(linear(x, concat(wq, wk, wv)), ids, table)

with each operand's first column in the attention's attribute `columns`. Left alone when the three do not read the same
rows, carry an activation, or have other readers; keys and values may be narrower than queries.
"""

from __future__ import annotations

from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.rewriter import Rewriter, shape_of


def merge_qkv(mod: ir.IRModule) -> ir.IRModule:
    """Replace the three projections in front of each attention by one."""
    return _MergeQkv(mod).run()


class _MergeQkv(Rewriter):
    def __init__(self, mod: ir.IRModule):
        super().__init__(mod)
        self._merged: dict[tuple[relax.Expr, ...], relax.Var] = {}

    def rules(self):
        return (self._merge,)

    def _merge(self, call: relax.Call) -> relax.Expr | None:
        attention = composite.match(call, "attention")
        if attention is None:
            return None
        operands = attention.tensors[:3]
        turns = [composite.match(self.definition(x), "rotary") for x in operands]
        sources = [x if turn is None else turn.tensors[0] for x, turn in zip(operands, turns, strict=True)]
        found = [self._mergeable(x) for x in sources]
        linears = [linear for linear in found if linear is not None]
        if len(linears) < 3 or not all(self.used_once(x) for x in operands):
            return None
        rows = linears[0].tensors[0]
        if not all(linear.tensors[0].same_as(rows) for linear in linears) or not _turn_alike(turns):
            return None
        weight, bias = (self._concat(tuple(linear.tensors[part] for linear in linears)) for part in (1, 2))
        widths = [int(shape_of(x)[-1]) for x in operands]
        total = sum(widths)
        offsets = [sum(widths[:i]) for i in range(3)]
        out = relax.TensorType((*rows.ty.shape.values[:-1], total), "float32")
        merged = self.emit(composite.Composite("linear", (rows, weight, bias), linears[0].attrs).call(out))
        if any(turn is not None for turn in turns):
            merged = self.emit(_turned(merged, turns, offsets))
        columns = [[total, offset + own] for offset, (_, own) in zip(offsets, attention.attrs["columns"], strict=True)]
        tensors = (merged, merged, merged, *attention.tensors[3:])
        return composite.Composite("attention", tensors, attention.attrs | {"columns": columns}).call(call.ty_args[0])

    def _concat(self, parts: tuple[relax.Expr, ...]) -> relax.Var:
        """The stacked weights; layers that share their weights share the result."""
        if parts not in self._merged:
            self._merged[parts] = self.emit(relax.op.concat(list(parts), axis=0))
        return self._merged[parts]

    def _mergeable(self, x: relax.Expr) -> composite.Composite | None:
        """The product that `x` is, if nothing is fused into it and nothing else reads it."""
        linear = composite.match(self.definition(x), "linear")
        plain = {"activation": None, "residual": False, "norm_eps": None}
        return linear if linear is not None and linear.attrs == plain and self.used_once(x) else None


Turns = list[composite.Composite | None]


def _turn_alike(turns: Turns) -> bool:
    """Whether those operands that are turned are turned by the same table and the same positions."""
    given = [turn for turn in turns if turn is not None]
    same = all(a.same_as(b) for turn in given for a, b in zip(turn.tensors[1:], given[0].tensors[1:], strict=True))
    return same and len({turn.attrs["head_dim"] for turn in given}) <= 1


def _turned(merged: relax.Var, turns: Turns, offsets: list[int]) -> relax.Call:
    """The rotations of several operands as one of the rows that hold them all."""
    given = [(turn, offset) for turn, offset in zip(turns, offsets, strict=True) if turn is not None]
    first, head_dim = given[0][0], given[0][0].attrs["head_dim"]
    spans = [[column + offset, heads] for turn, offset in given for column, heads in turn.attrs["spans"]]
    return composite.make(
        "rotary",
        [merged, *first.tensors[1:]],
        merged.ty,
        columns=int(shape_of(merged)[-1]),
        head_dim=head_dim,
        spans=composite.joined_spans(spans, head_dim),
    )
