"""Fuse the sum of embedding look-ups, and the LayerNorm over it.

    norm(take(word, ids) + take(type, type_ids) + take(position, position_ids), gamma, beta)
        --> turbo.embedding(ids, type_ids, position_ids, word, type, position, gamma, beta)

A single look-up is fused as well. Sums that hold anything else than look-ups are left alone. Runs after `fuse_norm`,
which may have taken the last sum as a residual.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import ir, relax

from turbo_tvm.ops import Embedding, Norm
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.passes.rewriter import Rewriter, is_call, shape_of


def fuse_embedding(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Replace embedding look-ups by `Embedding` operators."""
    return _FuseEmbedding(mod, function).run()


class _FuseEmbedding(Rewriter):
    def rules(self):
        return self._norm, self._sum, self._look_up

    def _look_up(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "take") or call.attrs.axis is None or int(call.attrs.axis) != 0:
            return None
        table, ids = call.args
        if len(shape_of(table)) != 2 or len(shape_of(ids)) != 2 or str(ids.ty.dtype) != "int32":
            return None
        if isinstance(shape_of(ids)[0], int):  # a look-up among weights, done once at compile time
            return None
        out = relax.TensorType((*ids.ty.shape.values, shape_of(table)[1]), "float32")
        return to_call(Embedding(ids=(ids,), tables=(table,), out=out))

    def _sum(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "add"):
            return None
        merged = self._merge(call.args, call.args[0].ty)
        return None if merged is None else to_call(merged)

    def _merge(self, terms: list[relax.Expr], out: relax.Type) -> Embedding | None:
        """Return one embedding for the sum of several, none of them normalised or read elsewhere."""
        found = [match(self.definition(term), Embedding) for term in terms]
        parts = [p for p in found if p is not None and p.norm_eps is None]
        if len(parts) < len(terms):
            return None
        if not all(self.used_once(term) for term in terms):
            return None
        ids = tuple(t for p in parts for t in p.ids)
        tables = tuple(t for p in parts for t in p.tables)
        return Embedding(ids=ids, tables=tables, out=out)

    def _norm(self, call: relax.Call) -> relax.Expr | None:
        norm = match(call, Norm)
        if norm is None or norm.is_rms:
            return None
        if norm.residual is not None:
            summed = self._merge([norm.x, norm.residual], norm.out)
        else:
            summed = match(self.definition(norm.x), Embedding) if self.used_once(norm.x) else None
        if summed is None or summed.norm_eps is not None:
            return None
        return to_call(replace(summed, gamma=norm.gamma, beta=norm.beta, norm_eps=norm.eps, out=norm.out))
