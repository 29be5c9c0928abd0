"""Fuse a matrix product with a weight, its bias and its activation.

    matmul(x, permute_dims(w)) + b, then gelu | gelu_tanh | relu | silu | tanh       --> turbo.linear(x, w, b)

`w` is stored as PyTorch stores it, `(out, in)`. A product without bias gets a zero one. A product of two activations,
or with a weight of other rank, is left alone. An activation whose product has other readers keeps its own operator.
"""

from __future__ import annotations

import numpy as np
from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.rewriter import Rewriter, is_call, shape_of

ACTIVATIONS = {
    "nn.gelu": "gelu",
    "nn.gelu_tanh": "gelu_tanh",
    "nn.relu": "relu",
    "nn.silu": "silu",
    "tanh": "tanh",
}


def fuse_linear(mod: ir.IRModule) -> ir.IRModule:
    """Replace products with weights by `turbo.linear` composites."""
    return _FuseLinear(mod).run()


class _FuseLinear(Rewriter):
    def rules(self):
        return self._product, self._bias, self._activation

    def _product(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "matmul"):
            return None
        x, shape = call.args[0], shape_of(call.args[1])
        if len(shape) != 2 or not self.is_weight(call.args[1]) or self.is_weight(x) or str(x.ty.dtype) != "float32":
            return None
        stored = self._transposed(call.args[1])
        weight = stored if stored is not None else self.emit(relax.op.permute_dims(call.args[1]))
        n = shape[1]
        zero = relax.const(np.zeros(n, "float32"))
        return composite.make("linear", [x, weight, zero], _like(x, n), activation=None, residual=False, norm_eps=None)

    def _transposed(self, expr: relax.Expr) -> relax.Expr | None:
        """The matrix that `expr` is the transpose of."""
        permute = self.call_of(expr, "permute_dims")
        if permute is None:
            return None
        axes = permute.attrs.axes
        return permute.args[0] if axes is None or [int(a) % 2 for a in axes] == [1, 0] else None

    def _bias(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "add"):
            return None
        for product, bias in (call.args, reversed(call.args)):
            linear = self._bare(product)
            if linear and self.used_once(product) and self._is_vector(bias, shape_of(product)[-1]):
                x, weight, _ = linear.tensors
                return composite.Composite("linear", (x, weight, bias), linear.attrs).call(product.ty)
        return None

    def _bare(self, expr: relax.Expr) -> composite.Composite | None:
        """A product that has neither a bias nor an activation yet."""
        linear = composite.match(self.definition(expr), "linear")
        if linear is None or linear.attrs["activation"] is not None:
            return None
        bias = linear.tensors[2]
        return linear if isinstance(bias, ir.GenericConst) and not bias.value.numpy().any() else None

    def _is_vector(self, bias: relax.Expr, columns: object) -> bool:
        return len(shape_of(bias)) == 1 and shape_of(bias)[0] == columns and self.is_weight(bias)

    def _activation(self, call: relax.Call) -> relax.Expr | None:
        name = next((value for op, value in ACTIVATIONS.items() if is_call(call, op)), None)
        linear = composite.match(self.definition(call.args[0]), "linear") if name else None
        if not linear or linear.attrs["activation"] is not None or not self.used_once(call.args[0]):
            return None
        fused = composite.Composite("linear", linear.tensors, linear.attrs | {"activation": name})
        return fused.call(call.args[0].ty)


def _like(x: relax.Expr, columns: int) -> relax.TensorType:
    return relax.TensorType((*x.ty.shape.values[:-1], columns), "float32")
