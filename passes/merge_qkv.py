"""Merge the projections of query, key and value into one product.

    q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv, bv); attention(q, k, v, ...)
        --> qkv = linear(x, concat(wq, wk, wv), concat(bq, bk, bv)); attention(qkv, qkv, qkv, ...)

with each operand's first column in the attention's attribute `columns`. Left alone when the three do not read the same
rows, carry an activation, or have other readers.
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
        found = [self._mergeable(x) for x in operands]
        linears = [linear for linear in found if linear is not None]
        if len(linears) < 3:
            return None
        rows = linears[0].tensors[0]
        if not all(linear.tensors[0].same_as(rows) for linear in linears):
            return None
        weight, bias = (self._concat(tuple(linear.tensors[part] for linear in linears)) for part in (1, 2))
        widths = [int(shape_of(x)[-1]) for x in operands]
        total = sum(widths)
        out = relax.TensorType((*rows.ty.shape.values[:-1], total), "float32")
        merged = self.emit(composite.Composite("linear", (rows, weight, bias), linears[0].attrs).call(out))
        columns = [[total, sum(widths[:i])] for i in range(3)]
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
