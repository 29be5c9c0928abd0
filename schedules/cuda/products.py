"""Products of tiles in shared memory, by tensor cores or in registers: how a block of the matrix kernel computes.

`BlockProduct` is the geometry; the macros work on tiles of x `(2, rows, depth)`, row-major for tensor cores and
transposed for registers, and of W `(2, depth, columns)`, both padded against bank conflicts.

Tensor cores: fragments of 16 x 16 x 16 (`nvcuda::wmma`, which every GPU from sm_70 on has; bf16 from sm_80 on). What a
lane holds of a fragment is the hardware's secret, so results pass through shared memory to be finished, 16 rows by 32
columns of a warp at a time: a warp waits for nobody else.
Registers: a thread takes 8 x 8 of the result as two by two groups of 4 x 4, whose operands are 128-bit accesses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.script import sync_warp

WARP = 32
FRAGMENT = 16
_PAD = 8  # elements after each row of a tile
_STAGE_COLUMNS, _STAGE_PAD = 32, 4
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
        """Fragments of a warp from top to bottom."""
        return self.rows // self.warps[0] // FRAGMENT

    @property
    def across(self) -> int:
        """Fragments of a warp from left to right."""
        return self.columns // self.warps[1] // FRAGMENT

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
        return (self.down * FRAGMENT * FRAGMENT,) if self.tensor_cores else (8,)

    @property
    def w_part(self) -> tuple[int, ...]:
        """What it holds of W."""
        return (self.across * FRAGMENT * FRAGMENT,) if self.tensor_cores else (8,)

    @property
    def sums(self) -> tuple[int, ...]:
        """The accumulators."""
        return (self.down * self.across * FRAGMENT * FRAGMENT,) if self.tensor_cores else (64,)

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
            for i in T.unroll(64):
                sums[i] = T.float32(0)

    return clear


def multiply_macro(block: BlockProduct) -> Macro:
    """`multiply(x_tile, w_tile, x_part, w_part, sums, warp, lane, side)`: sums += the product of one side's tiles."""
    down, across, stride_x, stride_w = block.down, block.across, block.x_shape[-1], block.w_shape[-1]

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
    def in_registers(x_tile, w_tile, x_part, w_part, sums, warp, lane, side):
        for group in range(block.depth // _UNROLLED):
            for i in T.unroll(_UNROLLED):
                row = T.meta_var(group * _UNROLLED + i)
                for half in T.unroll(2):
                    for j in T.vectorized(4):
                        x_part[half * 4 + j] = x_tile[side, row, half * 32 + lane // 4 * 4 + j]
                    for j in T.vectorized(4):
                        w_part[half * 4 + j] = w_tile[side, row, warp * 32 + half * 16 + lane % 4 * 4 + j]
                for r in T.unroll(8):
                    for c in T.unroll(8):
                        sums[r * 8 + c] = sums[r * 8 + c] + x_part[r] * w_part[c]

    return in_tensor_cores if block.tensor_cores else in_registers


def finish_macro(block: BlockProduct, vector: int) -> Macro:
    """`finish(sums, stage, values, warp, lane, store)`: every result, `vector` neighbours of a row at a time.

    values: local fp32 `(vector,)`, filled before each call of store(row, column), which are places in the tile.
    """
    across, down = block.across, block.down
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
        for r in T.unroll(8):
            for half in T.unroll(2):
                for piece in T.unroll(4 // vector):
                    for j in T.unroll(vector):
                        values[j] = sums[r * 8 + half * 4 + piece * vector + j]
                    store(
                        r // 4 * 32 + lane // 4 * 4 + r % 4,
                        warp * 32 + half * 16 + lane % 4 * 4 + piece * vector,
                    )

    return from_tensor_cores if block.tensor_cores else from_registers
