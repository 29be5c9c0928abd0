"""Products of tiles in shared memory, by tensor cores or in registers: how a block of the matrix kernel computes.

The macros, for the geometry of `BlockProduct`, work on tiles of x `(2, rows, depth)`, row-major for tensor cores and
transposed for registers, and of W `(2, depth, columns)`, both padded against bank conflicts.

Tensor cores: fragments of 16 x 16 x 16 (`nvcuda::wmma`, which every GPU from sm_70 on has; bf16 from sm_80 on). What a
lane holds of a fragment is the hardware's secret, so results pass through shared memory to be finished, 16 rows by 32
columns of a warp at a time: a warp waits for nobody else.
Registers: a thread takes groups of 4 x 4 of the result, by itself two by two of them, whose operands are 128-bit
accesses; a warp's threads lie 8 x 4, so that one group of each covers 32 rows by 16 columns.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.block_product import FRAGMENT, GROUP, LANES, STAGE_COLUMNS, STAGE_PAD, WARP, BlockProduct
from turbo_tvm.schedules.cuda.script import sync_warp

_UNROLLED = 4  # steps of k that are spelt out in registers; more only makes code that takes long to compile

Macro = Callable[..., None]


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
        for j in T.vectorized(GROUP):
            x_part[part * GROUP + j] = x_tile[
                side, row, block.first_row(warp) + part * unit[0] + lane // LANES[1] * GROUP + j
            ]

    @T.inline
    def load_w(w_part, w_tile, side, row, warp, lane, part):
        for j in T.vectorized(GROUP):
            w_part[part * GROUP + j] = w_tile[
                side, row, block.first_column(warp) + part * unit[1] + lane % LANES[1] * GROUP + j
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
                for r in T.unroll(down * GROUP):
                    for c in T.unroll(across * GROUP):
                        sums[r * (across * GROUP) + c] = sums[r * (across * GROUP) + c] + x_part[r] * w_part[c]

    return in_tensor_cores if block.tensor_cores else in_registers


def finish_macro(block: BlockProduct, vector: int) -> Macro:
    """`finish(sums, stage, values, warp, lane, store)`: every result, `vector` neighbours of a row at a time.

    values: local fp32 `(vector,)`, filled before each call of store(row, column), which are places in the tile.
    """
    across, down, unit = block.across, block.down, block.unit
    per_row = STAGE_COLUMNS // vector
    pieces = FRAGMENT * per_row // WARP
    pairs = STAGE_COLUMNS // FRAGMENT

    @T.inline
    def from_tensor_cores(sums, stage, values, warp, lane, store):
        for r in T.unroll(down):
            for group in T.unroll(across // pairs):
                for c in T.unroll(pairs):
                    T.evaluate(
                        T.tvm_store_matrix_sync(
                            *fragment(sums, r * across + group * pairs + c),
                            T.address_of(stage[warp, 0, c * FRAGMENT]),
                            STAGE_COLUMNS + STAGE_PAD,
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
        for r in T.unroll(down * GROUP):
            for part in T.unroll(across):
                for piece in T.unroll(GROUP // vector):
                    for j in T.unroll(vector):
                        values[j] = sums[r * (across * GROUP) + part * GROUP + piece * vector + j]
                    store(
                        block.first_row(warp) + r // GROUP * unit[0] + lane // LANES[1] * GROUP + r % GROUP,
                        block.first_column(warp) + part * unit[1] + lane % LANES[1] * GROUP + piece * vector,
                    )

    return from_tensor_cores if block.tensor_cores else from_registers
