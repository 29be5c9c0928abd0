"""Products of tiles in shared memory, by tensor cores or in registers: how a block of the matrix kernel computes.

The macros, for the geometry of `BlockProduct`, work on tiles of x `(2, rows, depth)`, row-major for tensor cores and
transposed for registers, and of W `(2, depth, columns)`, both padded against bank conflicts.

Tensor cores: fragments of 16 x 16 x 16 (`fragments.py`). What a lane holds of one is the hardware's secret, so results
pass through shared memory to be finished, 16 rows by 32 columns of a warp at a time: a warp waits for nobody else.
Registers: a thread takes groups of 4 x 4 of the result, by itself two by two of them, whose operands are 128-bit
accesses; a warp's threads lie 8 x 4, so that one group of each covers 32 rows by 16 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cuda.block_product import FRAGMENT, GROUP, LANES, STAGE_COLUMNS, STAGE_PAD, WARP, BlockProduct
from turbo_tvm.schedules.cuda.fragments import clear_fragment, load_fragment, multiply_fragments, store_fragment
from turbo_tvm.schedules.cuda.script import sync_warp

_UNROLLED = 4  # steps of k that are spelt out in registers; more only makes code that takes long to compile


@dataclass(frozen=True)
class Thread:
    """A thread's place in its block."""

    warp: Expr  # of the block
    lane: Expr  # of the warp

    @property
    def number(self) -> Expr:
        """Return the thread's number in the block."""
        return self.warp * WARP + self.lane


@dataclass(frozen=True)
class Memory:
    """What a block works in; shapes and scopes are `BlockProduct`'s."""

    x_tile: tvm.tirx.Buffer  # shared: two tiles of x
    w_tile: tvm.tirx.Buffer  # shared: two tiles of W
    stage: tvm.tirx.Buffer  # shared fp32: where results of tensor cores pass through
    x_held: tvm.tirx.Buffer  # local: the thread's part of the next tile of x, on its way from memory
    w_held: tvm.tirx.Buffer  # local: the same of W
    x_part: tvm.tirx.Buffer  # what a warp, or a thread, holds of x for one step
    w_part: tvm.tirx.Buffer  # what it holds of W
    sums: tvm.tirx.Buffer  # fp32: the accumulators
    values: tvm.tirx.Buffer  # local fp32: neighbours in a row of the result that are finished together


def clear_macro(block: BlockProduct) -> Macro:
    """Return `clear(sums)`: set the accumulators to zero."""

    @T.inline
    def clear(sums):
        if block.tensor_cores:
            for i in T.unroll(block.down * block.across):
                clear_fragment((sums, i))
        else:
            for i in T.unroll(block.sums[0]):
                sums[i] = T.float32(0)

    return clear


def multiply_macro(block: BlockProduct) -> Macro:
    """Return `multiply(memory, thread, side)`: add the product of one side's tiles to the accumulators."""
    return _multiply_fragments_macro(block) if block.tensor_cores else _multiply_registers_macro(block)


def _multiply_fragments_macro(block: BlockProduct) -> Macro:
    """Return `multiply` in tensor cores."""
    down, across, stride_x, stride_w = block.down, block.across, block.x_shape[-1], block.w_shape[-1]

    @T.inline
    def multiply(memory, thread, side):
        for i in T.unroll(block.depth // FRAGMENT):
            for r in T.unroll(down):
                load_fragment(
                    (memory.x_part, r),
                    memory.x_tile[side, (thread.warp // block.warps[1] * down + r) * FRAGMENT, i * FRAGMENT],
                    stride_x,
                )
            for c in T.unroll(across):
                load_fragment(
                    (memory.w_part, c),
                    memory.w_tile[side, i * FRAGMENT, (thread.warp % block.warps[1] * across + c) * FRAGMENT],
                    stride_w,
                )
            for r in T.unroll(down):
                for c in T.unroll(across):
                    multiply_fragments((memory.sums, r * across + c), (memory.x_part, r), (memory.w_part, c))

    return multiply


def _multiply_registers_macro(block: BlockProduct) -> Macro:
    """Return `multiply` in registers: accesses to x and W in turn, then all products of the thread."""
    down, across, both = block.down, block.across, min(block.down, block.across)
    load_x, load_w = _load_part_of_x_macro(block), _load_part_of_w_macro(block)

    @T.inline
    def multiply(memory, thread, side):
        for group in range(block.depth // _UNROLLED):
            for i in T.unroll(_UNROLLED):
                row = T.meta_var(group * _UNROLLED + i)
                for part in T.unroll(both):
                    load_x(memory, thread, side, row, part)
                    load_w(memory, thread, side, row, part)
                if down > both:
                    for part in T.unroll(down - both):
                        load_x(memory, thread, side, row, both + part)
                if across > both:
                    for part in T.unroll(across - both):
                        load_w(memory, thread, side, row, both + part)
                for r in T.unroll(down * GROUP):
                    for c in T.unroll(across * GROUP):
                        memory.sums[r * (across * GROUP) + c] = (
                            memory.sums[r * (across * GROUP) + c] + memory.x_part[r] * memory.w_part[c]
                        )

    return multiply


def _load_part_of_x_macro(block: BlockProduct) -> Macro:
    """Return `load_x(memory, thread, side, row, part)`: read one group of x for that row of k."""

    @T.inline
    def load_x(memory, thread, side, row, part):
        for j in T.vectorized(GROUP):
            memory.x_part[part * GROUP + j] = memory.x_tile[
                side, row, block.first_row(thread.warp) + part * block.unit[0] + thread.lane // LANES[1] * GROUP + j
            ]

    return load_x


def _load_part_of_w_macro(block: BlockProduct) -> Macro:
    """Return `load_w(memory, thread, side, row, part)`: read one group of W for that row of k."""

    @T.inline
    def load_w(memory, thread, side, row, part):
        for j in T.vectorized(GROUP):
            memory.w_part[part * GROUP + j] = memory.w_tile[
                side, row, block.first_column(thread.warp) + part * block.unit[1] + thread.lane % LANES[1] * GROUP + j
            ]

    return load_w


def finish_macro(block: BlockProduct, vector: int) -> Macro:
    """Return `finish(memory, thread, store)`: hand every result on, `vector` neighbours of a row at a time.

    memory.values holds them at each call of store(row, column), which are places in the tile.
    """
    return _finish_fragments_macro(block, vector) if block.tensor_cores else _finish_registers_macro(block, vector)


def _finish_fragments_macro(block: BlockProduct, vector: int) -> Macro:
    """Return `finish` of tensor cores: by way of the warp's stage."""
    across, down, warps_across = block.across, block.down, block.warps[1]
    per_row, pairs = STAGE_COLUMNS // vector, STAGE_COLUMNS // FRAGMENT
    pieces = FRAGMENT * per_row // WARP

    @T.inline
    def finish(memory, thread, store):
        for r in T.unroll(down):
            for group in T.unroll(across // pairs):
                for c in T.unroll(pairs):
                    store_fragment(
                        (memory.sums, r * across + group * pairs + c),
                        memory.stage[thread.warp, 0, c * FRAGMENT],
                        STAGE_COLUMNS + STAGE_PAD,
                    )
                sync_warp()
                for i in T.unroll(pieces):
                    for part in T.unroll(vector // min(vector, 4)):
                        for j in T.vectorized(min(vector, 4)):
                            memory.values[part * 4 + j] = memory.stage[
                                thread.warp,
                                (i * WARP + thread.lane) // per_row,
                                (i * WARP + thread.lane) % per_row * vector + part * 4 + j,
                            ]
                    store(
                        (thread.warp // warps_across * down + r) * FRAGMENT + (i * WARP + thread.lane) // per_row,
                        (thread.warp % warps_across * across + group * pairs) * FRAGMENT
                        + (i * WARP + thread.lane) % per_row * vector,
                    )
                sync_warp()

    return finish


def _finish_registers_macro(block: BlockProduct, vector: int) -> Macro:
    """Return `finish` of registers: neighbours are at hand."""
    across, down, unit = block.across, block.down, block.unit

    @T.inline
    def finish(memory, thread, store):
        for r in T.unroll(down * GROUP):
            for part in T.unroll(across):
                for piece in T.unroll(GROUP // vector):
                    for j in T.unroll(vector):
                        memory.values[j] = memory.sums[r * (across * GROUP) + part * GROUP + piece * vector + j]
                    store(
                        block.first_row(thread.warp)
                        + r // GROUP * unit[0]
                        + thread.lane // LANES[1] * GROUP
                        + r % GROUP,
                        block.first_column(thread.warp)
                        + part * unit[1]
                        + thread.lane % LANES[1] * GROUP
                        + piece * vector,
                    )

    return finish
