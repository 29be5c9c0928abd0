"""Fuse the sum of embedding look-ups, and the LayerNorm over it.

    norm(take(word, ids) + take(type, type_ids) + take(position, position_ids), gamma, beta)
        --> turbo.embedding(ids, type_ids, position_ids, word, type, position, gamma, beta)

A single look-up is fused as well. Sums that hold anything else than look-ups are left alone. Runs after `fuse_norm`,
which may have taken the last sum as a residual.
"""

from __future__ import annotations

from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.rewriter import Rewriter, is_call, shape_of


def fuse_embedding(mod: ir.IRModule) -> ir.IRModule:
    """Replace embedding look-ups by `turbo.embedding` composites."""
    return _FuseEmbedding(mod).run()


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
        return composite.make("embedding", [ids, table], out, tables=1, norm_eps=None)

    def _sum(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "add"):
            return None
        return self._merge(call.args, call.args[0].ty)

    def _merge(self, terms: list[relax.Expr], out: relax.Type) -> relax.Expr | None:
        """One composite for the sum of several, none of them normalised or read elsewhere."""
        found = [composite.match(self.definition(term), "embedding") for term in terms]
        parts = [p for p in found if p is not None and p.attrs["norm_eps"] is None]
        if len(parts) < len(terms):
            return None
        if not all(self.used_once(term) for term in terms):
            return None
        ids = [t for p in parts for t in p.tensors[: p.attrs["tables"]]]
        tables = [t for p in parts for t in p.tensors[p.attrs["tables"] :]]
        return composite.make("embedding", [*ids, *tables], out, tables=len(ids), norm_eps=None)

    def _norm(self, call: relax.Call) -> relax.Expr | None:
        norm = composite.match(call, "norm")
        if norm is None or norm.attrs.get("kind") == "rms":
            return None
        *terms, gamma, beta = norm.tensors
        merged = self._merge(terms, call.ty_args[0]) if len(terms) > 1 else self.definition(terms[0])
        summed = composite.match(merged, "embedding")
        if summed is None or summed.attrs["norm_eps"] is not None:
            return None
        if len(terms) == 1 and not self.used_once(terms[0]):
            return None
        attrs = summed.attrs | {"norm_eps": norm.attrs["eps"]}
        return composite.Composite("embedding", (*summed.tensors, gamma, beta), attrs).call(call.ty_args[0])
