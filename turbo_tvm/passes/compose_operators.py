"""Compose operators that exporters take apart, so that later passes meet each as one call.

    (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * gamma + beta     --> layer_norm(x, gamma, beta)
    x * 0.5 * (1 + erf(x / sqrt(2)))                                     --> gelu(x)
    0.5 * x * (1 + tanh(0.79788 * (x + 0.044715 * x^3)))                 --> gelu_tanh(x)

Factors and terms stand in any order; a square is a power or a product. Leaves everything else as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from tvm import ir, relax

from turbo_tvm.passes.rewriter import Rewriter, is_call, scalar, shape_of


def compose_operators(mod: ir.IRModule, function: str) -> ir.IRModule:
    """Bring normalisations and activations to single calls."""
    return _ComposeOperators(mod, function).run()


class _ComposeOperators(Rewriter):
    def rules(self):
        return self._layer_norm, self._gelu

    # Layer normalisation

    def _layer_norm(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "add"):
            return None
        for scaled, beta in _orders(call):
            product = self.call_of(scaled, "multiply")
            if product is None or len(shape_of(beta)) != 1:
                continue
            for normal, gamma in _orders(product):
                found = self._standardised(normal)
                if found is not None and len(shape_of(gamma)) == 1:
                    x, eps = found
                    return relax.op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=eps)
        return None

    def _standardised(self, expr: relax.Expr) -> tuple[relax.Expr, float] | None:
        """The x and eps of a row with mean 0 and variance 1."""
        call = self.call_of(expr, "divide")
        if call is None:
            return None
        x = self._source(call.args[0])
        root = self.call_of(call.args[1], "sqrt")
        if x is None or root is None:
            return None
        variance, eps = self._plus_scalar(root.args[0])
        mean = self._row_mean(variance) if variance is not None else None
        squared = self._square_of(mean) if mean is not None else None
        source = self._source(squared) if squared is not None else None
        return (x, eps) if source is not None and source.same_as(x) else None

    def _source(self, centred: relax.Expr) -> relax.Expr | None:
        """The x of x - mean(x)."""
        call = self.call_of(centred, "subtract")
        if call is None:
            return None
        mean = self._row_mean(call.args[1])
        return call.args[0] if mean is not None and mean.same_as(call.args[0]) else None

    def _row_mean(self, expr: relax.Expr) -> relax.Expr | None:
        """What `expr` is the mean of over the last axis, which it keeps."""
        call = self.call_of(expr, "mean")
        if call is None or not call.attrs.keepdims or call.attrs.axis is None:
            return None
        rank = len(shape_of(call.args[0]))
        return call.args[0] if [int(a) % rank for a in call.attrs.axis] == [rank - 1] else None

    def _square_of(self, expr: relax.Expr) -> relax.Expr | None:
        value = self.definition(expr)
        if is_call(value, "power") and scalar(value.args[1]) == 2.0:
            return value.args[0]
        return value.args[0] if is_call(value, "multiply") and value.args[0].same_as(value.args[1]) else None

    def _plus_scalar(self, expr: relax.Expr) -> tuple[relax.Expr | None, float]:
        call = self.call_of(expr, "add")
        for x, constant in _orders(call) if call is not None else ():
            value = scalar(constant)
            if value is not None:
                return x, value
        return None, 0.0

    # GELU

    def _gelu(self, call: relax.Call) -> relax.Expr | None:
        if not (is_call(call, "multiply") or is_call(call, "divide")):
            return None
        factors, constant = self._factors(call)
        if len(factors) != 2 or not math.isclose(constant, 0.5, rel_tol=1e-5):
            return None
        for x, gate in (factors, reversed(factors)):
            inner, value = self._plus_scalar(gate)
            if inner is None or value != 1.0:
                continue
            erf, tanh = self.call_of(inner, "erf"), self.call_of(inner, "tanh")
            if erf is not None and self._is_scaled(erf.args[0], x, math.sqrt(0.5)):
                return relax.op.nn.gelu(x)
            if tanh is not None and self._is_gelu_inner(tanh.args[0], x):
                return relax.op.nn.gelu_tanh(x)
        return None

    def _factors(self, expr: relax.Expr) -> tuple[list[relax.Expr], float]:
        """A product as its factors and a constant."""
        constant, factors, pending = 1.0, [], [expr]
        while pending:
            x = pending.pop()
            value, product, ratio = scalar(x), self._call_to(x, "multiply"), self._call_to(x, "divide")
            divisor = scalar(ratio.args[1]) if ratio is not None else None
            if value is not None:
                constant *= value
            elif product is not None:
                pending.extend(product.args)
            elif ratio is not None and divisor:
                constant /= divisor
                pending.append(ratio.args[0])
            else:
                factors.append(x)
        return factors, constant

    def _call_to(self, expr: relax.Expr, op: str) -> relax.Call | None:
        return expr if is_call(expr, op) else self.call_of(expr, op)

    def _is_scaled(self, expr: relax.Expr, x: relax.Expr, factor: float) -> bool:
        """Whether `expr` is x times that number; x may itself be scaled."""
        factors, constant = self._factors(expr)
        wanted, known = self._factors(x)
        same = len(factors) == len(wanted) == 1 and factors[0].same_as(wanted[0])
        return same and math.isclose(constant / known, factor, rel_tol=1e-5)

    def _is_gelu_inner(self, inner: relax.Expr, x: relax.Expr) -> bool:
        factors, constant = self._factors(inner)
        if len(factors) != 1:
            return False
        add = self.call_of(factors[0], "add")
        if add is None or not math.isclose(constant, math.sqrt(2.0 / math.pi), rel_tol=1e-5):
            return False
        for same, rest in _orders(add):
            cubes, small = self._factors(rest)
            if same.same_as(x) and math.isclose(small, 0.044715, rel_tol=1e-5) and self._is_cube(cubes, x):
                return True
        return False

    def _is_cube(self, factors: list[relax.Expr], x: relax.Expr) -> bool:
        if len(factors) == 3:
            return all(f.same_as(x) for f in factors)
        power = self.call_of(factors[0], "power") if len(factors) == 1 else None
        return power is not None and power.args[0].same_as(x) and scalar(power.args[1]) == 3.0


def _orders(call: relax.Call) -> Iterator[tuple[relax.Expr, relax.Expr]]:
    """The two arguments of a commutative call, in either order."""
    left, right = call.args
    yield left, right
    yield right, left
