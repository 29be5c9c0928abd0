"""Give row-wise kernels their tiles in a graph that stays padded.

    linear(x (b, s, k), ...) (b, s, n)
        --> reshape(untile_rows(linear(tile_rows(reshape(x, (b * s, k))), ...)), (b, s, n))

With tiles of a single row these are mere reshapes.

Only for models whose padding cannot be removed: their rows are copied into tiles and back around each product.
Operators of ours that are not row-wise do not occur in such a graph.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tvm import ir, relax

from turbo_tvm.ops import Linear, Norm, Operator, TileRows, UntileRows
from turbo_tvm.ops.call import match, to_call
from turbo_tvm.ops.operand import dims
from turbo_tvm.passes.rewriter import Rewriter, shape_of


def tile_rows(mod: ir.IRModule, function: str, row_tile: int) -> ir.IRModule:
    """Wrap every `turbo.linear` and `turbo.norm` on padded activations in row tiling.

    row_tile: rows per tile of the target's kernels.
    """
    return _TileRows(mod, function, row_tile).run()


class _TileRows(Rewriter):
    def __init__(self, mod: ir.IRModule, function: str, row_tile: int):
        super().__init__(mod, function)
        self.row_tile = row_tile

    def rules(self):
        return (self._row_wise,)

    def _row_wise(self, call: relax.Call) -> relax.Expr | None:
        found = match(call, Operator)
        if not isinstance(found, Linear | Norm):
            return None
        *lead, columns = dims(found.out)
        rows = math.prod(lead[1:], start=lead[0])
        tensors = {"x": found.x, "residual": found.residual}
        tiled_rows = {name: self._tile(t, rows) for name, t in tensors.items() if t is not None}
        tiled = self.emit(to_call(replace(found, **tiled_rows, out=self._tiles(rows, columns))))
        if self.row_tile > 1:
            tiled = self.emit(to_call(UntileRows(x=tiled, out=relax.TensorType((rows, columns), "float32"))))
        return relax.op.reshape(tiled, (*lead, columns))

    def _tiles(self, rows: Any, columns: int) -> relax.TensorType:
        tiles = rows if self.row_tile == 1 else (rows + self.row_tile - 1) // self.row_tile
        return relax.TensorType((tiles, self.row_tile, columns), "float32")

    def _tile(self, x: relax.Expr, rows: Any) -> relax.Var:
        columns = shape_of(x)[-1]
        if self.row_tile == 1:
            return self.emit(relax.op.reshape(x, (rows, 1, columns)))
        flat = self.emit(relax.op.reshape(x, (rows, columns)))
        return self.emit(to_call(TileRows(x=flat, out=self._tiles(rows, columns))))
