"""Fuse gated feed-forwards: one product for both projections, and one kernel for activation and product.

    gelu(linear(x, w0)) * linear(x, w1)               --> turbo.gate(turbo.linear(x, concat(w0, w1)))
    a, b = split(y, 2); gelu(a) * b                   --> turbo.gate(y)

for gelu, gelu_tanh, relu, silu and tanh, which may be the second half's. Runs after `fuse_linear`, which has fused the
activation into its product. Left alone where the projections read other rows than each other or have other readers.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import ir, relax

from turbo_tvm.ops import Gate, Linear
from turbo_tvm.ops.activations import activation_of
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.passes.rewriter import Rewriter, is_call, operator_name, same_shape, shape_of


def fuse_gate(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Replace products of an activated and a linear half by `Gate` operators."""
    return _FuseGate(mod, function).run()


class _FuseGate(Rewriter):
    def rules(self):
        return self._two_products, self._two_halves

    def _two_products(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "multiply"):
            return None
        for active, other in (call.args, reversed(call.args)):
            first, second = self._product(active), self._product(other)
            if first is None or second is None or first.activation is None:
                continue
            width = shape_of(active)[-1]
            if second.activation is not None or not second.x.same_as(first.x):
                return None
            if not same_shape(shape_of(active), shape_of(other)):
                return None
            parts = ((first.weight, second.weight), (first.bias, second.bias))
            weight, bias = (self.emit(relax.op.concat(list(pair), axis=0)) for pair in parts)
            both = relax.TensorType((*shape_of(active)[:-1], 2 * width), "float32")
            merged = to_call(replace(second, weight=weight, bias=bias, out=both))
            return self._gate(self.emit(merged), width, first.activation, second=False)
        return None

    def _product(self, expr: relax.Expr) -> Linear | None:
        """Return a product without residual and norm that nothing else reads."""
        linear = match(self.definition(expr), Linear)
        if linear is None or not self.used_once(expr):
            return None
        return linear if linear.residual is None and linear.norm_eps is None else None

    def _two_halves(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "multiply"):
            return None
        for active, other in (call.args, reversed(call.args)):
            value = self.definition(active)
            name = activation_of(operator_name(value))
            first, second = (self._half(value.args[0]) if name is not None else None), self._half(other)
            if name is None or first is None or second is None:
                continue
            if first[0].same_as(second[0]) and first[1] != second[1]:
                return self._gate(first[0], shape_of(other)[-1], name, second=first[1] == 1)
        return None

    def _half(self, expr: relax.Expr) -> tuple[relax.Expr, int] | None:
        """The rows, (tiles, R, 2 * columns), and which half of their columns `expr` is."""
        value = self.definition(expr)
        if isinstance(value, relax.TupleGetItem):
            split = self.call_of(value.tuple_value, "split")
            if split is None or len(shape_of(expr)) != 3 or int(split.attrs.axis) % 3 != 2:
                return None
            rows, index = split.args[0], int(value.index)
        elif is_call(value, "strided_slice"):
            axes, begin, _, *strides = (t.fields for t in value.args[1:])
            steps = [int(s.value) for s in strides[0]] if strides else [1]
            if len(shape_of(expr)) != 3 or [int(a.value) % 3 for a in axes] != [2] or steps != [1]:
                return None
            rows = value.args[0]
            index = int(begin[0].value) // max(1, shape_of(expr)[-1])
            if int(begin[0].value) != index * shape_of(expr)[-1]:
                return None
        else:
            return None
        whole = isinstance(shape_of(rows)[-1], int) and shape_of(rows)[-1] == 2 * shape_of(expr)[-1]
        return (rows, index) if whole and index in (0, 1) else None

    def _gate(self, rows: relax.Expr, columns: int, activation: str, second: bool) -> relax.Call:
        out = relax.TensorType((*shape_of(rows)[:-1], columns), "float32")
        return to_call(Gate(x=rows, out=out, activation=activation, columns=columns, second=second))
