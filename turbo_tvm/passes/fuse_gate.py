"""Fuse gated feed-forwards: one product for both projections, and one kernel for activation and product.

    gelu(linear(x, w0)) * linear(x, w1)               --> turbo.gate(turbo.linear(x, concat(w0, w1)))
    a, b = split(y, 2); gelu(a) * b                   --> turbo.gate(y)

for gelu, gelu_tanh, relu, silu and tanh, which may be the second half's. Runs after `fuse_linear`, which has fused the
activation into its product. Left alone where the projections read other rows than each other or have other readers.
"""

from __future__ import annotations

from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.fuse_linear import ACTIVATIONS
from turbo_tvm.passes.normalize import same_shape
from turbo_tvm.passes.rewriter import Rewriter, is_call, shape_of

_PLAIN = {"residual": False, "norm_eps": None}


def fuse_gate(mod: ir.IRModule) -> ir.IRModule:
    """Replace products of an activated and a linear half by `turbo.gate` composites."""
    return _FuseGate(mod).run()


class _FuseGate(Rewriter):
    def rules(self):
        return self._two_products, self._two_halves

    def _two_products(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "multiply"):
            return None
        for active, other in (call.args, reversed(call.args)):
            first, second = self._product(active), self._product(other)
            if first is None or second is None or first.attrs["activation"] is None:
                continue
            rows, width = first.tensors[0], shape_of(active)[-1]
            if second.attrs["activation"] is not None or not second.tensors[0].same_as(rows):
                return None
            if not same_shape(shape_of(active), shape_of(other)):
                return None
            parts = zip(first.tensors[1:3], second.tensors[1:3], strict=True)
            weight, bias = (self.emit(relax.op.concat(list(pair), axis=0)) for pair in parts)
            both = relax.TensorType((*shape_of(active)[:-1], 2 * width), "float32")
            merged = composite.Composite("linear", (rows, weight, bias), second.attrs).call(both)
            return self._gate(self.emit(merged), width, first.attrs["activation"], second=False)
        return None

    def _product(self, expr: relax.Expr) -> composite.Composite | None:
        """A product without residual and norm that nothing else reads."""
        linear = composite.match(self.definition(expr), "linear")
        if linear is None or not self.used_once(expr):
            return None
        return linear if all(linear.attrs[key] == value for key, value in _PLAIN.items()) else None

    def _two_halves(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "multiply"):
            return None
        for active, other in (call.args, reversed(call.args)):
            value = self.definition(active)
            name = next((name for op, name in ACTIVATIONS.items() if is_call(value, op)), None)
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
        attrs = {"activation": activation, "columns": columns} | ({"second": True} if second else {})
        return composite.make("gate", [rows], out, **attrs)
