"""The geometry of a block of the matrix kernel: what it computes, by which warps, and what that takes of the GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm.ir import Expr

from turbo_tvm.schedules.cuda.reduction import ACCESS_BYTES
from turbo_tvm.schedules.cuda.script import SHARED_BYTES

WARP = 32
FRAGMENT = 16
STAGE_COLUMNS, STAGE_PAD = 32, 4
GROUP = 4  # rows, and columns, of what a thread computes from one access to each operand
LANES = (8, 4)  # of a warp, down and across, where it multiplies in registers
_PAD = 8  # elements after each row of a tile
_MOST_REGISTERS = 200  # of a thread, for numbers; indices and addresses need some too


@dataclass(frozen=True)
class BlockProduct:
    """A block's tile of the output, and what multiplies it."""

    rows: int
    columns: int
    depth: int  # of k at a time
    warps: tuple[int, int]  # that share its rows, and its columns
    tensor_cores: bool  # or registers

    @property
    def threads(self) -> int:
        """Return the threads of the block."""
        return self.warps[0] * self.warps[1] * WARP

    @property
    def transposed(self) -> bool:
        """Return whether the tile of x is stored by columns."""
        return not self.tensor_cores

    @property
    def down(self) -> int:
        """Return the fragments of a warp, or groups of its threads, from top to bottom."""
        return self.rows // self.warps[0] // self.unit[0]

    @property
    def across(self) -> int:
        """Return the same from left to right."""
        return self.columns // self.warps[1] // self.unit[1]

    @property
    def unit(self) -> tuple[int, int]:
        """Return the rows and columns that a fragment, or one group of each thread of a warp, covers."""
        return (FRAGMENT, FRAGMENT) if self.tensor_cores else (LANES[0] * GROUP, LANES[1] * GROUP)

    @property
    def widest(self) -> int:
        """Return how many neighbours in a row a thread can finish together."""
        return 8 if self.tensor_cores else 4

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Return the shape of the two tiles of x in shared memory."""
        return (2, self.rows, self.depth + _PAD) if self.tensor_cores else (2, self.depth, self.rows + 4)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Return the shape of the two tiles of W in shared memory."""
        return (2, self.depth, self.columns + (_PAD if self.tensor_cores else 0))

    @property
    def stage_shape(self) -> tuple[int, ...]:
        """Return the shape of what the results of all warps pass through."""
        return (self.threads // WARP, FRAGMENT, STAGE_COLUMNS + STAGE_PAD)

    @property
    def x_part(self) -> tuple[int, ...]:
        """Return the shape of what a warp, or a thread, holds of x for one step."""
        return (self.down * FRAGMENT * FRAGMENT,) if self.tensor_cores else (self.down * GROUP,)

    @property
    def w_part(self) -> tuple[int, ...]:
        """Return the shape of what it holds of W."""
        return (self.across * FRAGMENT * FRAGMENT,) if self.tensor_cores else (self.across * GROUP,)

    @property
    def sums(self) -> tuple[int, ...]:
        """Return the shape of the accumulators."""
        one = FRAGMENT * FRAGMENT if self.tensor_cores else GROUP * GROUP
        return (self.down * self.across * one,)

    @property
    def x_scope(self) -> str:
        """Return TVM's storage scope for `x_part`."""
        return "wmma.matrix_a" if self.tensor_cores else "local"

    @property
    def w_scope(self) -> str:
        """Return the scope for `w_part`."""
        return "wmma.matrix_b" if self.tensor_cores else "local"

    @property
    def sums_scope(self) -> str:
        """Return the scope for `sums`."""
        return "wmma.accumulator" if self.tensor_cores else "local"

    def first_row(self, warp: Expr) -> Expr | int:
        """Return the first row of a warp's part of the tile."""
        return warp // self.warps[1] * (self.rows // self.warps[0]) if self.warps[0] > 1 else 0

    def first_column(self, warp: Expr) -> Expr:
        """Return its first column."""
        return (warp % self.warps[1] if self.warps[0] > 1 else warp) * (self.columns // self.warps[1])

    def fits(self, itemsize: int, x_vector: int) -> bool:
        """Return whether warps have whole parts of the tile, threads whole accesses, and a block what it needs.

        itemsize: bytes of an operand. x_vector: elements of x per access.
        """
        height, width = self.rows // self.warps[0], self.columns // self.warps[1]
        whole_width = STAGE_COLUMNS if self.tensor_cores else self.unit[1]
        x_held, w_held = self.rows * self.depth, self.depth * self.columns
        return (
            height % self.unit[0] == 0
            and width % whole_width == 0
            and x_held % (x_vector * self.threads) == 0
            and w_held % (ACCESS_BYTES // itemsize * self.threads) == 0
            and self._shared_bytes(itemsize) <= SHARED_BYTES
            and self._registers(itemsize) <= _MOST_REGISTERS
        )

    def _shared_bytes(self, itemsize: int) -> int:
        stage = math.prod(self.stage_shape) * 4 if self.tensor_cores else 0
        return (math.prod(self.x_shape) + math.prod(self.w_shape)) * itemsize + stage

    def _registers(self, itemsize: int) -> int:
        """Return the registers that numbers take: sums, parts of operands, and what is on its way from memory."""
        sharing = WARP if self.tensor_cores else 1  # threads that hold a fragment together
        parts = self.x_part[0] + self.w_part[0]
        moving = (self.rows + self.columns) * self.depth // self.threads
        return self.sums[0] // sharing + (parts // sharing + moving) * itemsize // 4


def block_product(dtype: str, columns: int) -> BlockProduct:
    """Return the usual geometry for operands of that dtype: 64 rows by a panel, by 4 warps."""
    if dtype == "float32":
        return BlockProduct(64, columns, 16, (1, 4), tensor_cores=False)
    return BlockProduct(64, columns, 32, (2, 2), tensor_cores=True)
