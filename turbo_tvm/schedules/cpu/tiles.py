"""Tile sizes of the CPU kernels: every other constant of a schedule derives from these four numbers.

Activations travel as `(tiles, row_tile, columns)`: the row count of a batch is rounded up once to the row tile,
so no kernel tests a row bound. Surplus rows hold anything finite and are never read across rows. A register tile of
the matrix kernel spans several row tiles, fewer where a batch ends: 16 rows are 8 + 8 and not 12 + 12.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import tvm
from tvm.target import codegen


@dataclass(frozen=True)
class CpuTiles:
    """Register-tile geometry of one instruction set."""

    lanes: int  # fp32 values per vector register
    row_tile: int  # rows of the layout's tile
    tile_units: int  # row tiles in the matrix kernel's register tile
    col_tile: int  # columns of that, a power-of-two multiple of `lanes`: LLVM turns other widths into scalar code
    amx: bool = False  # products and attention in bf16 run in AMX tiles, whose sizes are the instructions' own

    @property
    def tile_rows(self) -> int:
        """Rows of the matrix kernel's register tile."""
        return self.row_tile * self.tile_units

    @property
    def query_tile(self) -> int:
        """Queries that attention handles together: they lie across the lanes."""
        return self.col_tile

    @property
    def in_pairs(self) -> bool:
        """Whether products take neighbours along k in one element where the format has words."""
        return True

    def panels(self, columns: int) -> int:
        """Return how many column panels a weight of that many columns is packed into."""
        return -(-columns // self.col_tile)


AVX512 = CpuTiles(lanes=16, row_tile=4, tile_units=3, col_tile=32)  # 24 of 32 registers hold 12 x 32
AMX = replace(AVX512, amx=True)  # bf16 in tiles of 32 x 32; fp32 as ever
AVX2 = CpuTiles(lanes=8, row_tile=2, tile_units=3, col_tile=16)  # 12 of 16 hold 6 x 16
NEON = CpuTiles(lanes=4, row_tile=4, tile_units=3, col_tile=8)  # 24 of 32 hold 12 x 8
BASELINE = CpuTiles(lanes=4, row_tile=2, tile_units=2, col_tile=8)  # SSE, 8 of 16 hold 4 x 8; and any other CPU


def cpu_tiles(target: tvm.target.Target) -> CpuTiles:
    """Return the tile geometry for an `llvm` target, from the features of its `mcpu` and `mattr`."""
    with target:
        if codegen.target_has_features("avx512f"):
            return AMX if codegen.target_has_features("amx-bf16") else AVX512
        if codegen.target_has_features("avx2") and codegen.target_has_features("fma"):
            return AVX2
        if codegen.target_has_features("neon"):
            return NEON
    return BASELINE
