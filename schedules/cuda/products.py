"""Products of tiles in shared memory, by tensor cores or in registers: how a block of the matrix kernel computes.

`BlockProduct` is the geometry; the macros work on tiles of x `(2, rows, depth)`, row-major for tensor cores and
transposed for registers, and of W `(2, depth, columns)`, both padded against bank conflicts.

Tensor cores: fragments of 16 x 16 x 16 (`nvcuda::wmma`, which every GPU from sm_70 on has; bf16 from sm_80 on). What a
lane holds of a fragment is the hardware's secret, so results pass through shared memory to be finished, 16 rows by 32
columns of a warp at a time: a warp waits for nobody else.
Registers: a thread takes groups of 4 x 4 of the result, by itself two by two of them, whose operands are 128-bit
accesses; a warp's threads lie 8 x 4, so that one group of each covers 32 rows by 16 columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.reduction import ACCESS_BYTES
from turbo_tvm.schedules.cuda.script import SHARED_BYTES, sync_warp

WARP = 32
FRAGMENT = 16
_PAD = 8  # elements after each row of a tile
_STAGE_COLUMNS, _STAGE_PAD = 32, 4
_GROUP = 4  # rows, and columns, of what a thread computes from one access to each operand
_LANES = (8, 4)  # of a warp, down and across, where it multiplies in registers
_MOST_REGISTERS = 168  # of a thread, for numbers; indices and addresses need some too
_UNROLLED = 4  # steps of k that are spelt out in registers; more only makes code that takes long to compile

Macro = Callable[..., None]


@dataclass(frozen=True)
class BlockProduct:
    """A block's tile: `rows` by `columns`, `depth` of k at a time, by `warps` = (down, across) warps."""

    rows: int
    columns: int
    depth: int
    warps: tuple[int, int]
    tensor_cores: bool

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return self.warps[0] * self.warps[1] * WARP

    @property
    def transposed(self) -> bool:
        """Whether the tile of x is stored by columns."""
        return not self.tensor_cores

    @property
    def down(self) -> int:
        """Fragments of a warp, or groups of its threads, from top to bottom."""
        return self.rows // self.warps[0] // self.unit[0]

    @property
    def across(self) -> int:
        """The same from left to right."""
        return self.columns // self.warps[1] // self.unit[1]

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns that a fragment, or one group of each thread of a warp, covers."""
        return (FRAGMENT, FRAGMENT) if self.tensor_cores else (_LANES[0] * _GROUP, _LANES[1] * _GROUP)

    @property
    def widest(self) -> int:
        """Results that a thread can finish together: neighbours in a row."""
        return 8 if self.tensor_cores else 4

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The two tiles of x in shared memory."""
        return (2, self.rows, self.depth + _PAD) if self.tensor_cores else (2, self.depth, self.rows + 4)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """The two tiles of W in shared memory."""
        return (2, self.depth, self.columns + (_PAD if self.tensor_cores else 0))

    @property
    def stage_shape(self) -> tuple[int, ...]:
        """Where a warp's results pass through."""
        return (self.threads // WARP, FRAGMENT, _STAGE_COLUMNS + _STAGE_PAD)

    @property
    def x_part(self) -> tuple[int, ...]:
        """What a warp, or a thread, holds of x for one step."""
        return (self.down * FRAGMENT * FRAGMENT,) if self.tensor_cores else (self.down * _GROUP,)

    @property
    def w_part(self) -> tuple[int, ...]:
        """What it holds of W."""
        return (self.across * FRAGMENT * FRAGMENT,) if self.tensor_cores else (self.across * _GROUP,)

    @property
    def sums(self) -> tuple[int, ...]:
        """The accumulators."""
        one = FRAGMENT * FRAGMENT if self.tensor_cores else _GROUP * _GROUP
        return (self.down * self.across * one,)

    @property
    def x_scope(self) -> str:
        """TVM's storage scope for `x_part`."""
        return "wmma.matrix_a" if self.tensor_cores else "local"

    @property
    def w_scope(self) -> str:
        """For `w_part`."""
        return "wmma.matrix_b" if self.tensor_cores else "local"

    @property
    def sums_scope(self) -> str:
        """For `sums`."""
        return "wmma.accumulator" if self.tensor_cores else "local"

    def first_row(self, warp: Expr) -> Expr | int:
        """The first row of a warp's part of the tile."""
        return warp // self.warps[1] * (self.rows // self.warps[0]) if self.warps[0] > 1 else 0

    def first_column(self, warp: Expr) -> Expr:
        """Its first column."""
        return (warp % self.warps[1] if self.warps[0] > 1 else warp) * (self.columns // self.warps[1])

    def fits(self, itemsize: int, x_vector: int) -> bool:
        """Whether warps have whole parts of the tile, threads whole accesses, and a block enough of what it needs.

        itemsize: bytes of an operand. x_vector: elements of x per access.
        """
        height, width = self.rows // self.warps[0], self.columns // self.warps[1]
        whole_width = _STAGE_COLUMNS if self.tensor_cores else self.unit[1]
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
        """What a thread holds: sums, parts of operands, and what is on its way from memory."""
        sharing = WARP if self.tensor_cores else 1  # threads that hold a fragment together
        parts = self.x_part[0] + self.w_part[0]
        moving = (self.rows + self.columns) * self.depth // self.threads
        return self.sums[0] // sharing + (parts // sharing + moving) * itemsize // 4


def block_product(dtype: str, columns: int) -> BlockProduct:
    """The geometry for operands of that dtype: 64 rows by a panel, by 4 warps; fp32 by 128 threads of 8 x 8."""
    if dtype == "float32":
        return BlockProduct(64, columns, 16, (1, 4), tensor_cores=False)
    return BlockProduct(64, columns, 32, (2, 2), tensor_cores=True)


def fragment(buffer: tvm.tirx.Buffer, index: object) -> tuple:
    """The arguments that name a fragment of an array of them."""
    return buffer.data, FRAGMENT, FRAGMENT, FRAGMENT, index


def clear_macro(block: BlockProduct) -> Macro:
    """`clear(sums)`: zeros."""

    @T.inline
    def clear(sums):
        if block.tensor_cores:
            for i in T.unroll(block.down * block.across):
                T.evaluate(T.tvm_fill_fragment(*fragment(sums, i), T.float32(0)))
        else:
            for i in T.unroll(block.sums[0]):
                sums[i] = T.float32(0)

    return clear


def multiply_macro(block: BlockProduct) -> Macro:
    """`multiply(x_tile, w_tile, x_part, w_part, sums, warp, lane, side)`: sums += the product of one side's tiles."""
    down, across, stride_x, stride_w = block.down, block.across, block.x_shape[-1], block.w_shape[-1]
    both, unit = min(down, across), block.unit

    @T.inline
    def in_tensor_cores(x_tile, w_tile, x_part, w_part, sums, warp, lane, side):
        for i in T.unroll(block.depth // FRAGMENT):
            for r in T.unroll(down):
                T.evaluate(
                    T.tvm_load_matrix_sync(
                        *fragment(x_part, r),
                        T.address_of(x_tile[side, (warp // block.warps[1] * down + r) * FRAGMENT, i * FRAGMENT]),
                        stride_x,
                        "row_major",
                    )
                )
            for c in T.unroll(across):
                T.evaluate(
                    T.tvm_load_matrix_sync(
                        *fragment(w_part, c),
                        T.address_of(w_tile[side, i * FRAGMENT, (warp % block.warps[1] * across + c) * FRAGMENT]),
                        stride_w,
                        "row_major",
                    )
                )
            for r in T.unroll(down):
                for c in T.unroll(across):
                    T.evaluate(
                        T.tvm_mma_sync(
                            sums.data, r * across + c, x_part.data, r, w_part.data, c, sums.data, r * across + c
                        )
                    )

    @T.inline
    def load_x(x_part, x_tile, side, row, warp, lane, part):
        for j in T.vectorized(_GROUP):
            x_part[part * _GROUP + j] = x_tile[
                side, row, block.first_row(warp) + part * unit[0] + lane // _LANES[1] * _GROUP + j
            ]

    @T.inline
    def load_w(w_part, w_tile, side, row, warp, lane, part):
        for j in T.vectorized(_GROUP):
            w_part[part * _GROUP + j] = w_tile[
                side, row, block.first_column(warp) + part * unit[1] + lane % _LANES[1] * _GROUP + j
            ]

    @T.inline
    def in_registers(x_tile, w_tile, x_part, w_part, sums, warp, lane, side):
        for group in range(block.depth // _UNROLLED):
            for i in T.unroll(_UNROLLED):
                row = T.meta_var(group * _UNROLLED + i)
                for part in T.unroll(both):
                    load_x(x_part, x_tile, side, row, warp, lane, part)
                    load_w(w_part, w_tile, side, row, warp, lane, part)
                if down > both:
                    for part in T.unroll(down - both):
                        load_x(x_part, x_tile, side, row, warp, lane, both + part)
                if across > both:
                    for part in T.unroll(across - both):
                        load_w(w_part, w_tile, side, row, warp, lane, both + part)
                for r in T.unroll(down * _GROUP):
                    for c in T.unroll(across * _GROUP):
                        sums[r * (across * _GROUP) + c] = sums[r * (across * _GROUP) + c] + x_part[r] * w_part[c]

    return in_tensor_cores if block.tensor_cores else in_registers


def finish_macro(block: BlockProduct, vector: int) -> Macro:
    """`finish(sums, stage, values, warp, lane, store)`: every result, `vector` neighbours of a row at a time.

    values: local fp32 `(vector,)`, filled before each call of store(row, column), which are places in the tile.
    """
    across, down, unit = block.across, block.down, block.unit
    per_row = _STAGE_COLUMNS // vector
    pieces = FRAGMENT * per_row // WARP
    pairs = _STAGE_COLUMNS // FRAGMENT

    @T.inline
    def from_tensor_cores(sums, stage, values, warp, lane, store):
        for r in T.unroll(down):
            for group in T.unroll(across // pairs):
                for c in T.unroll(pairs):
                    T.evaluate(
                        T.tvm_store_matrix_sync(
                            *fragment(sums, r * across + group * pairs + c),
                            T.address_of(stage[warp, 0, c * FRAGMENT]),
                            _STAGE_COLUMNS + _STAGE_PAD,
                            "row_major",
                        )
                    )
                sync_warp()
                for i in T.unroll(pieces):
                    for part in T.unroll(vector // min(vector, 4)):
                        for j in T.vectorized(min(vector, 4)):
                            values[part * 4 + j] = stage[
                                warp,
                                (i * WARP + lane) // per_row,
                                (i * WARP + lane) % per_row * vector + part * 4 + j,
                            ]
                    store(
                        (warp // block.warps[1] * down + r) * FRAGMENT + (i * WARP + lane) // per_row,
                        (warp % block.warps[1] * across + group * pairs) * FRAGMENT
                        + (i * WARP + lane) % per_row * vector,
                    )
                sync_warp()

    @T.inline
    def from_registers(sums, stage, values, warp, lane, store):
        for r in T.unroll(down * _GROUP):
            for part in T.unroll(across):
                for piece in T.unroll(_GROUP // vector):
                    for j in T.unroll(vector):
                        values[j] = sums[r * (across * _GROUP) + part * _GROUP + piece * vector + j]
                    store(
                        block.first_row(warp) + r // _GROUP * unit[0] + lane // _LANES[1] * _GROUP + r % _GROUP,
                        block.first_column(warp) + part * unit[1] + lane % _LANES[1] * _GROUP + piece * vector,
                    )

    return from_tensor_cores if block.tensor_cores else from_registers
