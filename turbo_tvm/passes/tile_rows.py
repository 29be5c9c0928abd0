"""Give row-wise kernels their tiles in a graph that stays padded.

    linear(x (b, s, k), ...) (b, s, n)
        --> reshape(untile_rows(linear(tile_rows(reshape(x, (b * s, k))), ...)), (b, s, n))

With tiles of a single row these are mere reshapes.

Only for models whose padding cannot be removed: their rows are copied into tiles and back around each product.
Composites that are not row-wise do not occur in such a graph.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import ir, relax

from turbo_tvm.passes import composite
from turbo_tvm.passes.rewriter import Rewriter, dims_of, shape_of

ROW_WISE = ("linear", "norm")


def tile_rows(mod: ir.IRModule, row_tile: int) -> ir.IRModule:
    """Wrap every `turbo.linear` and `turbo.norm` on padded activations in row tiling.

    row_tile: rows per tile of the target's kernels.
    """
    return _TileRows(mod, row_tile).run()


class _TileRows(Rewriter):
    def __init__(self, mod: ir.IRModule, row_tile: int):
        super().__init__(mod)
        self.row_tile = row_tile

    def rules(self):
        return (self._row_wise,)

    def _row_wise(self, call: relax.Call) -> relax.Expr | None:
        fused = composite.match(call)
        if fused is None or fused.name not in ROW_WISE:
            return None
        rows_at = self._row_arguments(fused)
        lead = shape_of(fused.tensors[0])[:-1]
        rows = math.prod(lead[1:], start=lead[0])
        tensors = [self._tile(t, rows) if i in rows_at else t for i, t in enumerate(fused.tensors)]
        columns = dims_of(call.ty_args[0])[-1]
        tiled = self.emit(composite.Composite(fused.name, tuple(tensors), fused.attrs).call(self._tiles(rows, columns)))
        if self.row_tile > 1:
            tiled = self.emit(composite.make("untile_rows", [tiled], relax.TensorType((rows, columns), "float32")))
        return relax.op.reshape(tiled, (*lead, columns))

    def _row_arguments(self, fused: composite.Composite) -> set[int]:
        """The indices of the tensors that hold activations: the first, and the residual."""
        if not fused.attrs["residual"]:
            return {0}
        return {0, 3} if fused.name == "linear" else {0, 1}

    def _tiles(self, rows: Any, columns: int) -> relax.TensorType:
        tiles = rows if self.row_tile == 1 else (rows + self.row_tile - 1) // self.row_tile
        return relax.TensorType((tiles, self.row_tile, columns), "float32")

    def _tile(self, x: relax.Expr, rows: Any) -> relax.Var:
        columns = shape_of(x)[-1]
        if self.row_tile == 1:
            return self.emit(relax.op.reshape(x, (rows, 1, columns)))
        flat = self.emit(relax.op.reshape(x, (rows, columns)))
        return self.emit(composite.make("tile_rows", [flat], self._tiles(rows, columns)))
