"""Fuse pooling: from one row per token to one row per sequence.

    take(x, 0, axis=1)                                         --> turbo.pool(x, mask) mode "first"
    sum(x * m, axis=1) / n    with m = mask, n = its row sums  --> turbo.pool(x, mask) mode "mean"
    x / max(sqrt(sum(x * x)), eps)                             --> turbo.normalize(x)

`m` and `n` are evaluated on sample masks, so that every way to expand, cast or clamp them is recognised. Other pooling
(max, weighted, the last token) is left alone.
"""

from __future__ import annotations

import numpy as np
from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.evaluate import equals_for_masks
from turbo_tvm.passes.normalize import same_shape
from turbo_tvm.passes.rewriter import Rewriter, is_call, scalar, shape_of


def fuse_pooling(mod: ir.IRModule) -> ir.IRModule:
    """Replace pooling over tokens, and L2 normalisation of its result, by composites."""
    return _FusePooling(mod).run()


class _FusePooling(Rewriter):
    def __init__(self, mod: ir.IRModule):
        super().__init__(mod)
        self.inputs = {p.name: p for p in self.func.params[: int(self.func.attrs["num_input"])]}

    def rules(self):
        return (self._first, self._mean, self._normalize) if "attention_mask" in self.inputs else ()

    def _pool(self, x: relax.Expr, mode: str) -> relax.Call:
        batch, _, hidden = shape_of(x)
        out = relax.TensorType((batch, hidden), "float32")
        return composite.make("pool", [x, self.inputs["attention_mask"]], out, mode=mode)

    def _first(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "take") or len(shape_of(call.args[0])) != 3:
            return None
        if isinstance(shape_of(call.args[0])[1], int):  # not tokens: the head axis of a 4-D mask, say
            return None
        axis, index = call.attrs.axis, scalar(call.args[1]) if not shape_of(call.args[1]) else None
        return self._pool(call.args[0], "first") if axis is not None and int(axis) == 1 and index == 0 else None

    def _mean(self, call: relax.Call) -> relax.Expr | None:
        total = self.call_of(call.args[0], "sum") if is_call(call, "divide") else None
        if total is None or [int(a) for a in total.attrs.axis or []] != [1] or total.attrs.keepdims:
            return None
        product = self.call_of(total.args[0], "multiply")
        if product is None:
            return None
        for x, weights in (product.args, reversed(product.args)):
            if len(shape_of(x)) == 3 and self._is_mask(weights, shape_of(x)) and self._is_count(call.args[1], x):
                return self._pool(x, "mean")
        return None

    def _is_mask(self, weights: relax.Expr, shape: list) -> bool:
        return self._equals(weights, shape, lambda mask: mask[:, :, None])

    def _is_count(self, divisor: relax.Expr, x: relax.Expr) -> bool:
        return self._equals(divisor, shape_of(x), lambda mask: mask.sum(1, keepdims=True))

    def _equals(self, expr: relax.Expr, shape: list, expected) -> bool:
        mask = self.inputs["attention_mask"]
        return same_shape(shape[:2], shape_of(mask)) and equals_for_masks(self, mask, expr, expected)

    def _normalize(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "divide") or len(shape_of(call.args[0])) != 2:
            return None
        if not isinstance(shape_of(call.args[0])[1], int):  # one number per token, not a vector per sequence
            return None
        x, divisor = call.args[0], self.definition(call.args[1])
        if is_call(divisor, "broadcast_to"):
            divisor = self.definition(divisor.args[0])
        norm, eps = self._clamped(divisor)
        if norm is None or not self._is_row_norm(norm, x):
            return None
        return composite.make("normalize", [x], relax.TensorType(tuple(shape_of(x)), "float32"), eps=eps)

    def _clamped(self, expr: relax.Expr) -> tuple[relax.Expr | None, float | None]:
        if is_call(expr, "clip"):
            eps, ceiling = (float(bound.value) for bound in expr.args[1:])
            return (expr.args[0], eps) if ceiling >= np.finfo("float32").max else (None, 0.0)
        floor = scalar(expr.args[1]) if is_call(expr, "maximum") else None
        return (expr.args[0], floor) if floor is not None else (None, 0.0)

    def _is_row_norm(self, norm: relax.Expr, x: relax.Expr) -> bool:
        root = self.definition(norm)
        if not (is_call(root, "sqrt") or self._is_power(root, 0.5)):
            return False
        total = self.call_of(root.args[0], "sum")
        if total is None or [int(a) % 2 for a in total.attrs.axis or []] != [1] or not total.attrs.keepdims:
            return False
        square = self.definition(total.args[0])
        if is_call(square, "multiply"):
            return all(arg.same_as(x) for arg in square.args)
        if not self._is_power(square, 2.0):
            return False
        size = self.call_of(square.args[0], "abs")  # torch's decomposition of a vector norm takes it
        return (square.args[0] if size is None else size.args[0]).same_as(x)

    def _is_power(self, expr: relax.Expr, exponent: float) -> bool:
        return is_call(expr, "power") and scalar(expr.args[1]) == exponent
