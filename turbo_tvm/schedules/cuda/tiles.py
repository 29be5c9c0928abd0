"""Tile sizes of the CUDA kernels.

Rows need no rounding here: every kernel tests its last row, which costs a GPU next to nothing, so that activations are
`(rows, 1, columns)`: the row tile of the layout is one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CudaTiles:
    """Geometry that the layout of data depends on: every target shares it, so that one artifact serves them all."""

    row_tile: int = 1  # rows of the layout's tile
    col_tile: int = 128  # columns of a panel of weights, and of the matrix kernel's tile
    query_tile: int = 64  # queries that a block of the attention kernel takes

    @property
    def in_pairs(self) -> bool:
        """Whether products take neighbours along k in one element where the format has words."""
        return False

    def panels(self, columns: int) -> int:
        """Return how many column panels a weight of that many columns is packed into."""
        return -(-columns // self.col_tile)


CUDA_TILES = CudaTiles()
