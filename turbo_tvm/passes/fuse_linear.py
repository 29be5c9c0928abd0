"""Fuse a matrix product with a weight, its bias and its activation.

    matmul(x, permute_dims(w)) + b, then gelu | gelu_tanh | relu | silu | tanh       --> turbo.linear(x, w, b)
    y * sigmoid(1.702 * y), which is CLIP's quick_gelu, of a product y        --> the same
    linear(x, w, b) * v, with a weight (n,) for v                             --> turbo.linear(x, w * v, b * v)

`w` is stored as PyTorch stores it, `(out, in)`. A product without bias gets a zero one. A product of two activations,
or with a weight of other rank, is left alone. An activation whose product has other readers keeps its own operator.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from tvm import ir, relax

from turbo_tvm.ops import Linear
from turbo_tvm.ops.activations import activation_of
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.passes.rewriter import Rewriter, is_call, operator_name, scalar, shape_of


def fuse_linear(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Replace products with weights by `Linear` operators."""
    return _FuseLinear(mod, function).run()


class _FuseLinear(Rewriter):
    def rules(self):
        return self._product, self._bias, self._scale, self._activation, self._quick_gelu

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
        return to_call(Linear(x=x, weight=weight, bias=zero, out=_like(x, n)))

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
                return to_call(replace(linear, bias=bias))
        return None

    def _bare(self, expr: relax.Expr) -> Linear | None:
        """Return a product that has neither a bias nor an activation yet."""
        linear = match(self.definition(expr), Linear)
        if linear is None or linear.activation is not None:
            return None
        return linear if isinstance(linear.bias, ir.GenericConst) and not linear.bias.value.numpy().any() else None

    def _is_vector(self, bias: relax.Expr, columns: object) -> bool:
        return len(shape_of(bias)) == 1 and shape_of(bias)[0] == columns and self.is_weight(bias)

    def _scale(self, call: relax.Call) -> relax.Expr | None:
        """LayerScale: the factors go into the weights."""
        if not is_call(call, "multiply"):
            return None
        for product, factors in (call.args, reversed(call.args)):
            linear = match(self.definition(product), Linear)
            if linear is None or linear.activation is not None or not self.used_once(product):
                continue
            if self._is_vector(factors, shape_of(product)[-1]):
                scaled = self.emit(relax.op.multiply(linear.weight, self.emit(relax.op.expand_dims(factors, [1]))))
                shifted = self.emit(relax.op.multiply(linear.bias, factors))
                return to_call(replace(linear, weight=scaled, bias=shifted))
        return None

    def _activation(self, call: relax.Call) -> relax.Expr | None:
        name = activation_of(operator_name(call))
        return self._activated(call.args[0], name, readers=1) if name else None

    def _quick_gelu(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "multiply"):
            return None
        for product, gate in (call.args, reversed(call.args)):
            sigmoid = self.call_of(gate, "sigmoid")
            inner = self.call_of(sigmoid.args[0], "multiply") if sigmoid is not None else None
            if sigmoid is None or inner is None or not self.used_once(gate) or not self.used_once(sigmoid.args[0]):
                continue
            for same, factor in (inner.args, reversed(inner.args)):
                value = scalar(factor)
                if same.same_as(product) and value is not None and math.isclose(value, 1.702, rel_tol=1e-6):
                    return self._activated(product, "quick_gelu", readers=2)
        return None

    def _activated(self, product: relax.Expr, name: str, readers: int) -> relax.Expr | None:
        """The product with that activation, if it has none and is read by nothing else."""
        linear = match(self.definition(product), Linear)
        if linear is None or linear.activation is not None or self.uses(product) != readers:
            return None
        return to_call(replace(linear, activation=name))


def _like(x: relax.Expr, columns: int) -> relax.TensorType:
    return relax.TensorType((*x.ty.shape.values[:-1], columns), "float32")
