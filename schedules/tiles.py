"""Tile sizes of the CPU kernels: every other constant of a schedule derives from these four numbers.

Activations travel as `(tiles, row_tile, columns)`: the row count of a batch is rounded up once to the row tile,
so no kernel tests a row bound. Surplus rows hold anything finite and are never read across rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.target import codegen


@dataclass(frozen=True)
class CpuTiles:
    """Register-tile geometry of one instruction set.

    lanes: fp32 values per vector register.
    row_tile: rows of the matrix kernel's register tile.
    col_tile: columns of it, a power-of-two multiple of `lanes` (LLVM turns other widths into scalar code).
    """

    lanes: int
    row_tile: int
    col_tile: int

    @property
    def query_tile(self) -> int:
        """Queries that attention handles together: they lie across the lanes."""
        return self.col_tile

    def panels(self, columns: int) -> int:
        """How many column panels a weight of that many columns is packed into."""
        return -(-columns // self.col_tile)


AVX512 = CpuTiles(lanes=16, row_tile=12, col_tile=32)  # 24 of 32 registers hold the tile
AVX2 = CpuTiles(lanes=8, row_tile=6, col_tile=16)  # 12 of 16
NEON = CpuTiles(lanes=4, row_tile=12, col_tile=8)  # 24 of 32
BASELINE = CpuTiles(lanes=4, row_tile=4, col_tile=8)  # SSE: 8 of 16, and any other CPU


def cpu_tiles(target: tvm.target.Target) -> CpuTiles:
    """The tile geometry for an `llvm` target, from the features of its `mcpu` and `mattr`."""
    with target:
        if codegen.target_has_features("avx512f"):
            return AVX512
        if codegen.target_has_features("avx2") and codegen.target_has_features("fma"):
            return AVX2
        if codegen.target_has_features("neon"):
            return NEON
    return BASELINE
