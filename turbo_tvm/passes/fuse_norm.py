"""Fuse the residual sum and LayerNorm into the product before them.

    layer_norm(linear(x, w, b) + r, gamma, beta)      --> turbo.linear(x, w, b, r, gamma, beta)
    linear(x, w, b) + r                               --> turbo.linear(x, w, b, r)          (pre-norm models)
    layer_norm(linear(x, w, b), gamma, beta)          --> turbo.linear(x, w, b, gamma, beta)
    layer_norm(x [+ r], gamma, beta)                  --> turbo.norm(x, [r], gamma, beta)
    x / sqrt(mean(x^2) + eps) * gamma                 --> turbo.norm(x, [r], gamma) kind "rms"

RMS norm is found in the spellings of PyTorch and ONNX: a power or a product, rsqrt, or sqrt and a quotient, in any
order. A sum or product that has other readers is computed on its own and normalised by a `turbo.norm`. So is every
product where whole rows do not meet in one kernel (`in_products`). Norms of weights are left alone: they are computed
once.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import ir, relax

from turbo_tvm.ops import Linear, Norm
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.passes.rewriter import Rewriter, is_call, same_shape, scalar, shape_of


def fuse_norm(mod: ir.IRModule, function: str, in_products: bool = True) -> ir.IRModule:
    """Fuse residual sums and LayerNorm over the last axis into operators of ours.

    in_products: whether a product's kernel can normalise its rows.
    """
    return _FuseNorm(mod, function, in_products).run()


class _FuseNorm(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, in_products: bool):
        super().__init__(mod, function)
        self.in_products = in_products

    def rules(self):
        return self._residual, self._norm, self._rms_norm

    def _residual(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "add"):
            return None
        for product, other in (call.args, reversed(call.args)):
            linear = self._open_linear(product)
            if linear is not None and same_shape(shape_of(product), shape_of(other)):
                return to_call(replace(linear, residual=other, out=product.ty))
        return None

    def _open_linear(self, expr: relax.Expr) -> Linear | None:
        """Return a product without residual or norm that nothing else reads."""
        linear = match(self.definition(expr), Linear)
        if linear is None or linear.residual is not None or linear.norm_eps is not None:
            return None
        return linear if self.used_once(expr) else None

    def _norm(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "nn.layer_norm") or [int(a) for a in call.attrs.axes] != [-1]:
            return None
        if not call.attrs.center or not call.attrs.scale:
            return None
        x, gamma, beta = call.args
        if len(shape_of(x)) < 2 or len(shape_of(gamma)) != 1 or self.is_weight(x):
            return None
        eps = float(call.attrs.epsilon)
        linear = match(self.definition(x), Linear)
        if self.in_products and linear is not None and linear.norm_eps is None and self.used_once(x):
            return to_call(replace(linear, gamma=gamma, beta=beta, norm_eps=eps, out=x.ty))
        return self._of_sum(Norm(x=x, gamma=gamma, beta=beta, eps=eps, out=x.ty), readers=1)

    def _of_sum(self, norm: Norm, readers: int) -> relax.Expr:
        """Return the norm, which reads the two summands of x if nobody else needs their sum: `readers` are its own."""
        add = self.call_of(norm.x, "add")
        if add is not None and self.uses(norm.x) == readers and same_shape(*(shape_of(arg) for arg in add.args)):
            x, residual = add.args
            return to_call(replace(norm, x=x, residual=residual))
        return to_call(norm)

    def _rms_norm(self, call: relax.Call) -> relax.Expr | None:
        found = self._gained(call)
        if found is None:
            return None
        x, gamma, eps, readers = found
        if len(shape_of(x)) < 2 or str(x.ty.dtype) != "float32" or shape_of(gamma) != shape_of(x)[-1:]:
            return None
        if self.is_weight(x):
            return None
        return self._of_sum(Norm(x=x, gamma=gamma, eps=eps, out=x.ty), readers)

    def _gained(self, call: relax.Call) -> tuple[relax.Expr, relax.Expr, float, int] | None:
        """(x, gamma, eps, readers of x) of an RMS norm."""
        if is_call(call, "nn.rms_norm") and [int(a) for a in call.attrs.axes] in (
            [-1],
            [len(shape_of(call.args[0])) - 1],
        ):
            return *call.args, float(call.attrs.epsilon), 1
        if not is_call(call, "multiply"):
            return None
        for gamma, scaled in (call.args, reversed(call.args)):
            found = self._over_root(scaled) if len(shape_of(gamma)) == 1 else None
            if found is not None:
                x, eps, readers = found
                return x, gamma, eps, readers
        return None

    def _over_root(self, expr: relax.Expr) -> tuple[relax.Expr, float, int] | None:
        """(x, eps, readers of x) of x / sqrt(mean(x^2) + eps)."""
        value = self.definition(expr)
        pairs = []
        if is_call(value, "multiply"):
            pairs = [(x, self._inverse_root_of(r)) for x, r in (value.args, reversed(value.args))]
        elif is_call(value, "divide"):
            root = self.call_of(value.args[1], "sqrt")
            pairs = [(value.args[0], root.args[0] if root is not None else None)]
        for x, inner in pairs:
            square = self._mean_square(inner, x) if inner is not None else None
            if square is not None:
                eps, readers = square
                return x, eps, 1 + readers
        return None

    def _inverse_root_of(self, expr: relax.Expr) -> relax.Expr | None:
        """What expr is 1 / sqrt of."""
        inverse = self.call_of(expr, "rsqrt")
        if inverse is not None:
            return inverse.args[0]
        divide = self.call_of(expr, "divide")
        if divide is None or scalar(divide.args[0]) != 1.0:
            return None
        root = self.call_of(divide.args[1], "sqrt")
        return root.args[0] if root is not None else None

    def _mean_square(self, expr: relax.Expr, x: relax.Expr) -> tuple[float, int] | None:
        """(eps, readers of x) of mean(x^2) + eps over the last axis."""
        add = self.call_of(expr, "add")
        for total, constant in (add.args, reversed(add.args)) if add is not None else ():
            mean, eps = self.call_of(total, "mean"), scalar(constant)
            if mean is None or eps is None or not mean.attrs.keepdims:
                continue
            last = [int(a) % len(shape_of(x)) for a in mean.attrs.axis or []] == [len(shape_of(x)) - 1]
            readers = self._readers_of_square(mean.args[0], x)
            if last and readers:
                return eps, readers
        return None

    def _readers_of_square(self, expr: relax.Expr, x: relax.Expr) -> int:
        """How often x is read if expr is its square, else 0."""
        power, product = self.call_of(expr, "power"), self.call_of(expr, "multiply")
        if power is not None and power.args[0].same_as(x) and scalar(power.args[1]) == 2.0:
            return 1
        return 2 if product is not None and all(arg.same_as(x) for arg in product.args) else 0
