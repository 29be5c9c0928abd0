"""Pack the weights of every product into the kernels' panels, and attention's tables over distances.

    linear(x, w (n, k), b (n,))
        --> linear(x, turbo.pack_weight(w) (panels, k, col_tile), turbo.pack_bias(b) (panels * col_tile,))

    linear(x in bf16, w, b)
        --> linear(x, turbo.pack_weight(w, pairs) (panels, k / 2, col_tile) int32, ...)

    attention(q, k, v, ..., table (heads, head_dim, 2L - 1))
        --> attention(q, k, v, ..., turbo.pack_distances(table) (heads * head_dim * width,))

Kernels that multiply no pairs get weights in the format of x.

Layers that share a weight share its packed form. `hoist_weights` then moves the packing out of `main`.
"""

from __future__ import annotations

from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.lower_precision import BF16
from turbo_tvm.passes.rewriter import Rewriter, shape_of

_LINE = 16  # elements of 4 bytes in a cache line


def pack_weights(mod: ir.IRModule, col_tile: int, pairs: bool = True) -> ir.IRModule:
    """Insert the packing of weights in front of every `turbo.linear`.

    col_tile: columns per panel of the target's matrix kernel. pairs: whether it multiplies bf16 in pairs.
    """
    return _PackWeights(mod, col_tile, pairs).run()


class _PackWeights(Rewriter):
    def __init__(self, mod: ir.IRModule, col_tile: int, pairs: bool):
        super().__init__(mod)
        self.col_tile, self.pairs = col_tile, pairs
        self._packed: dict[tuple[str, str, relax.Expr], relax.Var] = {}

    def rules(self):
        return self._linear, self._attention

    def _linear(self, call: relax.Call) -> relax.Expr | None:
        linear = composite.match(call, "linear")
        if linear is None or len(shape_of(linear.tensors[1])) != 2:
            return None
        x, weight, bias, *rest = linear.tensors
        n, k = shape_of(weight)
        panels = -(-n // self.col_tile)
        stored = str(x.ty.dtype)
        if self.pairs and stored == BF16:
            packed = self._pack("pack_weight", weight, (panels, k // 2, self.col_tile), "int32", k=k, n=n, pairs=True)
        else:
            packed = self._pack("pack_weight", weight, (panels, k, self.col_tile), stored, k=k, n=n)
        packed_bias = self._pack("pack_bias", bias, (panels * self.col_tile,), "float32", n=n)
        return composite.Composite("linear", (x, packed, packed_bias, *rest), linear.attrs).call(call.ty_args[0])

    def _attention(self, call: relax.Call) -> relax.Expr | None:
        attention = composite.match(call, "attention")
        count = composite.distance_tables(attention) if attention is not None else 0
        if attention is None or not count or len(shape_of(attention.tensors[-1])) != 3:
            return None
        tables = attention.tensors[-count:]
        heads, head_dim, columns = shape_of(tables[0])
        pairs = self.pairs and str(attention.tensors[0].ty.dtype) == BF16
        # the lanes of a query tile may reach past the last column; an odd number of cache lines
        width = (-(-(columns + self.col_tile - 1) // _LINE) | 1) * _LINE
        sizes = {"heads": heads, "head_dim": head_dim, "columns": columns, "width": width}
        shape, dtype = (heads * head_dim * width,), "float32"
        if pairs:
            shape, dtype, sizes["pairs"] = (heads * (head_dim // 2) * width,), "int32", True
        packed = [self._pack("pack_distances", table, shape, dtype, **sizes) for table in tables]
        tensors = (*attention.tensors[:-count], *packed)
        return composite.Composite("attention", tensors, attention.attrs).call(call.ty_args[0])

    def _pack(self, name: str, weight: relax.Expr, shape: tuple, dtype: str, **attrs: int) -> relax.Var:
        """The packed weight; shared when several products read the same one (tied layers)."""
        key = (name, dtype, weight)
        if key not in self._packed:
            out = relax.TensorType(shape, dtype)
            self._packed[key] = self.emit(composite.make(name, [weight], out, **attrs))
        return self._packed[key]
