"""Pack the weights of every product into the kernels' panels, and attention's tables over distances.

    linear(x, w (n, k), b (n,))
        --> linear(x, turbo.pack_weight(w) (panels, k, col_tile), turbo.pack_bias(b) (panels * col_tile,))

    linear(x in bf16, w, b)
        --> linear(x, turbo.pack_weight(w, pairs) (panels, k / 2, col_tile) int32, ...)

    attention(q, k, v, ..., table (heads, head_dim, 2L - 1))
        --> attention(q, k, v, ..., turbo.pack_distances(table) (heads * head_dim * width,))

Kernels that multiply no pairs get weights in the format of x.

Layers that share a weight share its packed form. `lift_transform_params` then moves the packing out of `main`.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import ir, relax

from turbo_tvm.ops import Attention, Linear, Operator, PackBias, PackDistances, PackWeight
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.ops.formats import FP32, LINE_BYTES, of_storage
from turbo_tvm.passes.rewriter import Rewriter, shape_of

_LINE = LINE_BYTES // 4  # elements of a packed table in a cache line


def pack_weights(mod: ir.IRModule, function: str, col_tile: int, pairs: bool = True) -> ir.IRModule:
    """Insert the packing of weights in front of every `turbo.linear`.

    col_tile: columns per panel of the target's matrix kernel. pairs: whether it multiplies bf16 in pairs.
    """
    return _PackWeights(mod, function, col_tile, pairs).run()


class _PackWeights(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, col_tile: int, pairs: bool):
        super().__init__(mod, function)
        self.col_tile, self.pairs = col_tile, pairs
        self._packed: dict[tuple[type[Operator], str, relax.Expr], relax.Var] = {}

    def rules(self):
        return self._linear, self._attention

    def _linear(self, call: relax.Call) -> relax.Expr | None:
        linear = match(call, Linear)
        if linear is None or len(shape_of(linear.weight)) != 2:
            return None
        n, k = shape_of(linear.weight)
        panels = -(-n // self.col_tile)
        dtype, per_element = self._elements(linear.x)
        packed = relax.TensorType((panels, k // per_element, self.col_tile), dtype)
        padded = relax.TensorType((panels * self.col_tile,), FP32.storage)
        weight = self._pack(linear.weight, PackWeight(weight=linear.weight, out=packed))
        bias = self._pack(linear.bias, PackBias(bias=linear.bias, out=padded))
        return to_call(replace(linear, weight=weight, bias=bias))

    def _attention(self, call: relax.Call) -> relax.Expr | None:
        attention = match(call, Attention)
        tables = attention.distance_tables if attention is not None else ()
        if attention is None or not tables or len(shape_of(tables[0])) != 3:
            return None
        packed = {
            name: self._distances(table, attention.q)
            for name, table in (("key_table", attention.key_table), ("query_table", attention.query_table))
            if table is not None
        }
        return to_call(replace(attention, **packed))

    def _distances(self, table: relax.Expr, rows: relax.Expr) -> relax.Var:
        """Return the packed table, which is multiplied with rows like these."""
        heads, head_dim, columns = shape_of(table)
        # the lanes of a query tile may reach past the last column; an odd number of cache lines
        width = (-(-(columns + self.col_tile - 1) // _LINE) | 1) * _LINE
        dtype, per_element = self._elements(rows) if self.pairs else (FP32.storage, 1)
        out = relax.TensorType((heads * (head_dim // per_element) * width,), dtype)
        return self._pack(table, PackDistances(table=table, row_width=width, out=out))

    def _elements(self, rows: relax.Expr) -> tuple[str, int]:
        """Return the dtype of weights that are multiplied with these rows, and how many numbers an element holds."""
        dtype = str(rows.ty.dtype)
        stored = of_storage(dtype)
        if self.pairs and stored is not None and stored.word is not None:
            return stored.word, stored.per_word
        return dtype, 1

    def _pack(self, weight: relax.Expr, packing: Operator) -> relax.Var:
        """Return the packed weight; shared when several products read the same one (tied layers)."""
        key = (type(packing), str(packing.out.dtype), weight)
        if key not in self._packed:
            self._packed[key] = self.emit(to_call(packing))
        return self._packed[key]
