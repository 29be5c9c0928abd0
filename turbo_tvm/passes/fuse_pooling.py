"""Fuse pooling: from one row per token to one row per sequence.

    take(x, 0, axis=1)                                         --> turbo.pool(x, mask) mode "first"
    take(x, i, axis=1), in images, which are all as long       --> turbo.pool(x, mask) mode "first" row i
    index(x, (arange, argmax(ids == 7)))                       --> turbo.pool(x, mask) mode "first" token 7
    index(x, (arange, argmax(ids)))                            --> turbo.pool(x, mask) mode "first" token -1
    gather_nd(x, concat(arange, argmax(ids)))                  --> the same
    sum(x * m, axis=1) / n    with m = mask, n = its row sums  --> turbo.pool(x, mask) mode "mean"
    x / max(sqrt(sum(x * x)), eps)                             --> turbo.normalize(x)

`m` and `n` are evaluated on sample masks, and indices on sample ids, so that every way to expand, cast or clamp them is
recognised. Other pooling (max, weighted, the last token) is left alone.
"""

from __future__ import annotations

import numpy as np
from tvm import ir, relax, tirx

from turbo_tvm.ops import L2Normalize, Pool
from turbo_tvm.ops.call import to_call
from turbo_tvm.ops.inputs import Inputs
from turbo_tvm.ops.pool import LARGEST, PoolMode
from turbo_tvm.passes.analysis.evaluate import cut, equals_for_masks, evaluate
from turbo_tvm.passes.rewriter import Rewriter, is_call, same_shape, scalar, shape_of


def fuse_pooling(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Replace pooling over tokens, and L2 normalisation of its result, by operators of ours."""
    return _FusePooling(mod, function).run()


class _FusePooling(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str):
        super().__init__(mod, function)
        self.inputs = Inputs.of(self.func)

    def rules(self):
        return (self._first, self._at, self._mean, self._normalize) if self.inputs.attention_mask is not None else ()

    def _pool(self, x: relax.Expr, mode: PoolMode, row: int = 0, token: int | None = None) -> relax.Call:
        batch, _, hidden = shape_of(x)
        out = relax.TensorType((batch, hidden), "float32")
        return to_call(Pool(x=x, mask=self.inputs.attention_mask, out=out, mode=mode, row=row, token=token))

    def _first(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "take") or len(shape_of(call.args[0])) != 3:
            return None
        tokens, of_images = shape_of(call.args[0])[1], self.inputs.are_images
        if isinstance(tokens, int) and not (of_images and tokens == shape_of(self.inputs.attention_mask)[1]):
            return None  # not tokens: the head axis of a 4-D mask, say
        axis, index = call.attrs.axis, scalar(call.args[1]) if not shape_of(call.args[1]) else None
        if axis is None or int(axis) != 1 or index is None:
            return None
        if index == 0:
            return self._pool(call.args[0], "first")
        known = of_images and 0 < index < tokens
        return self._pool(call.args[0], "first", row=int(index)) if known else None

    def _at(self, call: relax.Call) -> relax.Expr | None:
        """The token of a certain id, as in CLIP's text encoder."""
        if not (is_call(call, "index_tensor") or is_call(call, "gather_nd")) or len(shape_of(call.args[0])) != 3:
            return None
        tokens = shape_of(call.args[0])[:2]
        places = self._places(call, tokens)
        if places is None or not all(isinstance(d, tirx.Var) for d in tokens):
            return None
        pairs = is_call(call, "gather_nd")
        for token in (LARGEST, *self._numbers(places)):
            # also without it, and more than once
            ids = np.random.default_rng(0).integers(token - 1, token + 3, (40, 5))
            wanted = ids.argmax(1) if token == LARGEST else (ids == token).argmax(1)
            wanted = np.stack([np.arange(len(ids)), wanted], 1) if pairs else wanted
            if self._is_index(places, wanted, ids, tokens):
                return self._pool(call.args[0], "first", token=token)
        return None

    def _places(self, call: relax.Call, tokens: list) -> relax.Expr | None:
        """Where in its sequence, or as a pair with which sequence, each row of the result stands."""
        if is_call(call, "gather_nd"):
            plain = int(call.attrs.batch_dims) == 0 and same_shape(shape_of(call.args[1]), [tokens[0], 2])
            return call.args[1] if plain else None
        indices = self.definition(call.args[1])
        if not isinstance(indices, relax.Tuple) or len(indices.fields) != 2:
            return None
        sequences, places = indices.fields
        return places if self._counts(sequences, tokens[0]) else None

    def _counts(self, expr: relax.Expr, batch: tirx.Var) -> bool:
        """Whether this is 0, 1, 2, ... up to the batch."""
        arange = self.call_of(expr, "arange")
        if arange is None or not same_shape(shape_of(arange), [batch]):
            return False
        start, _, step = arange.args
        return same_shape([start, step], [0, 1])

    def _numbers(self, expr: relax.Expr) -> list[int]:
        """The whole numbers from 0 that an expression compares with, or whatever else it does with them."""
        values = [self.definition(expr), *(value for _, value in cut(self, expr)[1])]
        found = [scalar(arg) for value in values if isinstance(value, relax.Call) for arg in value.args]
        return sorted({int(number) for number in found if number is not None and number >= 0 and number % 1 == 0})

    def _is_index(self, expr: relax.Expr, wanted: np.ndarray, ids: np.ndarray, tokens: list) -> bool:
        def value_of(param: relax.Var) -> np.ndarray | None:
            is_ids = self.inputs.token_ids is not None and param.same_as(self.inputs.token_ids)
            return ids.astype(str(param.ty.dtype)) if is_ids else None

        value = evaluate(self, expr, dict(zip(tokens, ids.shape, strict=True)), value_of)
        return value is not None and value.shape == wanted.shape and bool((value == wanted).all())

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
        mask = self.inputs.attention_mask
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
        if norm is None or eps is None or not self._is_row_norm(norm, x):
            return None
        return to_call(L2Normalize(x=x, out=relax.TensorType(tuple(shape_of(x)), "float32"), eps=eps))

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
