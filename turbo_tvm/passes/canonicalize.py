"""Canonicalise the imported graph: one spelling for each thing, so that later passes match one pattern.

    permute(permute(x))                                --> permute(x), or x
    reshape(reshape(x)); reshape, cast, broadcast to what x already is   --> reshape(x); x
    take(table, ids, mode="fast")                          --> take(table, ids, mode="clip")
    reshape(take(table, reshape(ids, (n,))), (b, s, h))    --> take(table, ids)
    reshape(permute(reshape(x, (b * h, s, d)), (0, 2, 1)), (b, h, d, s)) --> permute(x, (0, 1, 3, 2))
    shape_to_tensor(shape_of(x))                           --> shape_to_tensor(its dimensions)
    x * sigmoid(x)                                         --> silu(x)

Leaves everything else as it is.
"""

from __future__ import annotations

from tvm import ir, relax, tirx

from turbo_tvm.passes.rewriter import Rewriter, is_call, same_shape, shape_of


def canonicalize(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Bring an imported function to the spelling that the other passes expect."""
    return _Canonicalize(mod, function).run()


class _Canonicalize(Rewriter):
    def rules(self):
        return (
            self._permute,
            self._no_change,
            self._take,
            self._embedding,
            self._batched_permute,
            self._shape,
            self._reshape,
            self._silu,
        )

    def _permute(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "permute_dims"):
            return None
        inner = self.call_of(call.args[0], "permute_dims")
        if inner is None:
            return None
        outer_axes, inner_axes = _axes(call), _axes(inner)
        axes = [inner_axes[a] for a in outer_axes]
        source = inner.args[0]
        return source if axes == sorted(axes) else relax.op.permute_dims(source, axes)

    def _no_change(self, call: relax.Call) -> relax.Expr | None:
        if not any(is_call(call, op) for op in ("reshape", "broadcast_to", "astype")):
            return None
        source = call.args[0]
        if is_call(call, "astype"):
            same = str(source.ty.dtype) == str(call.attrs.dtype)
        else:
            same = same_shape(shape_of(source), list(call.args[1].values))
        return source if same else None

    def _embedding(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "reshape"):
            return None
        take = self.call_of(call.args[0], "take")
        flat = self.call_of(take.args[1], "reshape") if take is not None else None
        if take is None or flat is None or int(take.attrs.axis) != 0 or len(shape_of(take.args[1])) != 1:
            return None
        table, ids = take.args[0], flat.args[0]
        if not same_shape([*shape_of(ids), *shape_of(table)[1:]], list(call.args[1].values)):
            return None
        return relax.op.take(table, ids, axis=0, mode="clip")

    def _take(self, call: relax.Call) -> relax.Expr | None:
        """Ids are checked before anything runs; "fast" is undefined for any other."""
        if not is_call(call, "take") or call.attrs.mode != "fast":
            return None
        axis = call.attrs.axis
        return relax.op.take(*call.args, axis=None if axis is None else int(axis), mode="clip")

    def _batched_permute(self, call: relax.Call) -> relax.Expr | None:
        """A transpose of matrices in a batch that was flattened for it."""
        permute = self.call_of(call.args[0], "permute_dims") if is_call(call, "reshape") else None
        inner = self.call_of(permute.args[0], "reshape") if permute is not None else None
        if permute is None or inner is None or _axes(permute) != [0, 2, 1]:
            return None
        source = inner.args[0]
        dims = shape_of(source)
        if len(dims) != 4 or not same_shape(shape_of(permute.args[0])[1:], dims[2:]):
            return None
        if not same_shape([*dims[:2], dims[3], dims[2]], list(call.args[1].values)):
            return None
        swapped = relax.op.permute_dims(source, [0, 1, 3, 2])
        merged = self._permute(swapped)
        return swapped if merged is None else merged

    def _shape(self, call: relax.Call) -> relax.Expr | None:
        """A shape by its dimensions, so that it does not depend on the values of what has it."""
        shape = self.call_of(call.args[0], "shape_of") if is_call(call, "shape_to_tensor") else None
        dims = shape_of(shape.args[0]) if shape is not None else []
        if not dims:
            return None
        numbers = [tirx.const(d, "int64") if isinstance(d, int) else d for d in dims]
        return relax.op.shape_to_tensor(relax.ShapeExpr(numbers))

    def _reshape(self, call: relax.Call) -> relax.Expr | None:
        inner = self.call_of(call.args[0], "reshape") if is_call(call, "reshape") else None
        if inner is None:
            return None
        source, shape = inner.args[0], call.args[1]
        return source if same_shape(shape_of(source), list(shape.values)) else relax.op.reshape(source, shape)

    def _silu(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "multiply"):
            return None
        for x, gate in (call.args, reversed(call.args)):
            sigmoid = self.call_of(gate, "sigmoid")
            if sigmoid is not None and sigmoid.args[0].same_as(x):
                return relax.op.nn.silu(x)
        return None


def _axes(permute: relax.Call) -> list[int]:
    rank = len(shape_of(permute.args[0]))
    axes = permute.attrs.axes
    return [int(a) % rank for a in axes] if axes is not None else list(reversed(range(rank)))
