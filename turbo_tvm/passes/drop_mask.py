"""Drop the zeros that a model writes over the rows of padding.

    multiply(x (b, s, n), m (b, s, 1))  with m = mask        --> x

Right only for what `remove_padding` follows: real rows are multiplied by 1, and of the others nothing is left. `m` is
evaluated on sample masks. Runs after pooling is fused, which wants to see such a product.
"""

from __future__ import annotations

from tvm import ir, relax

from turbo_tvm.ops.inputs import Inputs
from turbo_tvm.passes.analysis.evaluate import equals_for_masks
from turbo_tvm.passes.rewriter import Rewriter, is_call, same_shape, shape_of


def drop_mask(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Remove multiplications of one row per token with the attention mask."""
    return _DropMask(mod, function).run()


class _DropMask(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str):
        super().__init__(mod, function)
        self.mask = Inputs.of(self.func).attention_mask

    def rules(self):
        return (self._product,) if self.mask is not None else ()

    def _product(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "multiply"):
            return None
        for x, factor in (call.args, reversed(call.args)):
            rows, shape = shape_of(x), shape_of(factor)
            if len(rows) == len(shape) == 3 and shape[2] in (1, rows[2]) and self._is_mask(factor):
                return x
        return None

    def _is_mask(self, factor: relax.Expr) -> bool:
        per_token = same_shape(shape_of(factor)[:2], shape_of(self.mask))
        return per_token and equals_for_masks(self, self.mask, factor, lambda mask: mask[:, :, None])
