"""Normalise the imported graph: one spelling for each thing, so that later passes match one pattern.

    permute(permute(x))                                --> permute(x), or x
    reshape(reshape(x)); reshape, cast, broadcast to what x already is   --> reshape(x); x
    take(table, ids, mode="fast")                          --> take(table, ids, mode="clip")
    reshape(take(table, reshape(ids, (n,))), (b, s, h))    --> take(table, ids)
    0.5 * x * (1 + tanh(0.79788 * (x + 0.044715 * x^3)))   --> gelu_tanh(x)
    x * sigmoid(x)                                         --> silu(x)

Leaves everything else as it is.
"""

from __future__ import annotations

import math

from tvm import ir, relax
from tvm.sym.analyzer import Analyzer

from turbo_tvm.passes.rewriter import Rewriter, is_call, scalar, shape_of


def normalize(mod: ir.IRModule) -> ir.IRModule:
    """Bring an imported module to the spelling that the other passes expect."""
    return _Normalize(mod).run()


class _Normalize(Rewriter):
    def rules(self):
        return self._permute, self._no_change, self._take, self._embedding, self._reshape, self._gelu_tanh, self._silu

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

    def _reshape(self, call: relax.Call) -> relax.Expr | None:
        inner = self.call_of(call.args[0], "reshape") if is_call(call, "reshape") else None
        if inner is None:
            return None
        source, shape = inner.args[0], call.args[1]
        return source if same_shape(shape_of(source), list(shape.values)) else relax.op.reshape(source, shape)

    def _gelu_tanh(self, call: relax.Call) -> relax.Expr | None:
        """0.5 * x * (1 + tanh(inner)), in either order of the factors."""
        if not is_call(call, "multiply"):
            return None
        for half, one_plus in (call.args, reversed(call.args)):
            x = self._times(half, 0.5)
            tanh_sum = self.call_of(one_plus, "add")
            inner = self._plus_one(tanh_sum) if tanh_sum is not None else None
            if x is not None and inner is not None and self._is_gelu_inner(inner, x):
                return relax.op.nn.gelu_tanh(x)
        return None

    def _times(self, expr: relax.Expr, factor: float) -> relax.Expr | None:
        call = self.call_of(expr, "multiply")
        if call is None:
            return None
        for x, constant in (call.args, reversed(call.args)):
            value = scalar(constant)
            if value is not None and math.isclose(value, factor, rel_tol=1e-5):
                return x
        return None

    def _plus_one(self, add: relax.Call) -> relax.Expr | None:
        for x, constant in (add.args, reversed(add.args)):
            tanh = self.call_of(x, "tanh")
            if tanh is not None and scalar(constant) == 1.0:
                return tanh.args[0]
        return None

    def _is_gelu_inner(self, inner: relax.Expr, x: relax.Expr) -> bool:
        total = self._times(inner, math.sqrt(2.0 / math.pi))
        add = self.call_of(total, "add") if total is not None else None
        if add is None:
            return False
        for same, rest in (add.args, reversed(add.args)):
            cube = self._times(rest, 0.044715)
            power = self.call_of(cube, "power") if cube is not None else None
            if power is not None and same.same_as(x) and power.args[0].same_as(x) and scalar(power.args[1]) == 3.0:
                return True
        return False

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


def same_shape(left: list, right: list) -> bool:
    """Whether two shapes are provably equal, dimension by dimension."""
    analyzer = Analyzer()
    return len(left) == len(right) and all(analyzer.can_prove_equal(a, b) for a, b in zip(left, right, strict=True))
