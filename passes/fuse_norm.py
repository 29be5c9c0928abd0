"""Fuse the residual sum and LayerNorm into the product before them.

    layer_norm(linear(x, w, b) + r, gamma, beta)      --> turbo.linear(x, w, b, r, gamma, beta)
    linear(x, w, b) + r                               --> turbo.linear(x, w, b, r)          (pre-norm models)
    layer_norm(linear(x, w, b), gamma, beta)          --> turbo.linear(x, w, b, gamma, beta)
    layer_norm(x [+ r], gamma, beta)                  --> turbo.norm(x, [r], gamma, beta)

A sum or product that has other readers is computed on its own and normalised by a `turbo.norm`. So is every product
where whole rows do not meet in one kernel (`in_products`). Norms of weights are left alone: they are computed once.
"""

from __future__ import annotations

from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.normalize import same_shape
from turbo_tvm.passes.rewriter import Rewriter, is_call, shape_of


def fuse_norm(mod: ir.IRModule, in_products: bool = True) -> ir.IRModule:
    """Fuse residual sums and LayerNorm over the last axis into composites.

    in_products: whether a product's kernel can normalise its rows.
    """
    return _FuseNorm(mod, in_products).run()


class _FuseNorm(Rewriter):
    def __init__(self, mod: ir.IRModule, in_products: bool):
        super().__init__(mod)
        self.in_products = in_products

    def rules(self):
        return self._residual, self._norm

    def _residual(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "add"):
            return None
        for product, other in (call.args, reversed(call.args)):
            linear = self._open_linear(product)
            if linear is not None and same_shape(shape_of(product), shape_of(other)):
                fused = composite.Composite("linear", (*linear.tensors, other), linear.attrs | {"residual": True})
                return fused.call(product.ty)
        return None

    def _open_linear(self, expr: relax.Expr) -> composite.Composite | None:
        """A product without residual or norm that nothing else reads."""
        linear = composite.match(self.definition(expr), "linear")
        closed = linear is None or linear.attrs["residual"] or linear.attrs["norm_eps"] is not None
        return None if closed or not self.used_once(expr) else linear

    def _norm(self, call: relax.Call) -> relax.Expr | None:
        if not is_call(call, "nn.layer_norm") or [int(a) for a in call.attrs.axes] != [-1]:
            return None
        if not call.attrs.center or not call.attrs.scale:
            return None
        x, gamma, beta = call.args
        if len(shape_of(x)) < 2 or len(shape_of(gamma)) != 1 or self.is_weight(x):
            return None
        eps = float(call.attrs.epsilon)
        linear = composite.match(self.definition(x), "linear")
        if self.in_products and linear is not None and linear.attrs["norm_eps"] is None and self.used_once(x):
            tensors = (*linear.tensors, gamma, beta)
            return composite.Composite("linear", tensors, linear.attrs | {"norm_eps": eps}).call(x.ty)
        add = self.call_of(x, "add")
        if add is not None and self.used_once(x) and same_shape(*(shape_of(arg) for arg in add.args)):
            return composite.make("norm", [*add.args, gamma, beta], x.ty, eps=eps, residual=True)
        return composite.make("norm", [x, gamma, beta], x.ty, eps=eps, residual=False)
