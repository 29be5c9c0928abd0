"""The bf16 matrix kernel on CPUs with Intel AMX: `schedules/linear.py` with tile instructions.

Shapes and parameters are those of `linear.linear` with x in bf16, weights packed in pairs along k.

Strategy
1. A task is 32 rows x 32 columns of the output, the accumulators of four tiles, in one pass over k. A step is 32 of k:
   two tiles of x and two of the weight are loaded and multiplied each with each, four products for four loads.
2. The accumulators go through `acc`, from where bias, activation and residual apply to them, a row or a few after each
   step of the NEXT task: vector instructions run beside the tiles', and nobody waits for the stores. The last
   row is done by the last step, when the next accumulators come. Hence a parallel iteration is a run of tasks.
3. The last tile of a batch has the rows that are left, a multiple of R. An instruction takes as long as its tile has
   rows, so they need not be spread evenly; a tile of at most 16 rows does without the lower half. Tiles are configured
   anew where that changes: it costs as much as two steps.
4. What k leaves over 32 is one step more, of smaller tiles: the accumulators pass through memory, because configuring
   clears all tiles. Nothing is read beyond k.
5. Tasks are numbered row block, panel, tile within the block. A block of x and two panels fit L2: a panel stays there
   while the tiles of a block pass over it, each prefetching its share of the next one. With one tile in a block the
   prefetch runs `ahead_kib` ahead: arithmetic takes no time then, memory all of it.
6. The norm needs whole rows: a second parallel loop normalises `out` in place. If n is no multiple of 32, those columns
   of the last panel that exist are copied one by one.

Measured (Granite Rapids, 2 threads, 1,024 rows): 2,500 to 3,300 GFLOP/s, 1.2 to 1.8 times an earlier version's, which
finished a tile right after its last step and prefetched nothing; at 8 rows the two are equal (alternating in one
process). Tiles in registers do 6,500 with zeros for data and 5,000 with numbers; loaded from L2 as here, 3,600.

Rejected after measuring: row blocks of 600 KB and 1.2 MB (5 to 10 % slower with 3,072 columns); prefetching into
L1, and the lines of residual and output (no gain); x copied into whole tiles beforehand (no gain); the even steps of k
first, so that loads and the stores of `acc` fall into different sets of L1 (20 % slower). On Emerald Rapids, where
both operands come from L2: k in parts of 8 or 12 steps, so that a part of a panel stays in L1 over the tiles of a block
(5 to 13 % slower: accumulators go to memory and back), steps of k spelt out by 2 or 4 (8 %), x or both operands asked
into L1 a step ahead (5 to 17 %). Tiles of 48 x 32 or 32 x 48, six accumulators, read 5 tiles of L2 for 6 products in
place of 6, at 7 loads: alone 8 to 12 % faster, in this kernel 3 % faster at best (39 % at exactly 48 rows of 768
columns) and mostly 5 to 20 % slower, in turn on a machine whose other threads are busy at times. Equal: other orders of
the four loads, weight tiles in one piece, huge pages, rows finished evenly over all steps.

How far it is: on Emerald Rapids, rows an odd number of lines apart (`passes/widen_rows.py`), 1,024 rows, 768 to 2,304
columns, this kernel did 2,340 GFLOP/s at best; the same loads and products in a loop of C, without an epilogue, 2,780;
with operands in L1, 4,580 (the best of three separate runs, on a machine that halves its speed at times). Without the
epilogue, in turn with it, the kernel gains 6 to 16 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.linear import Product, product_kernel
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.script import CACHE_LINE_FLOATS, CPU_LLVM, prefetch_near, prefetch_read
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cpu.vector_math import activation as activation_by_name

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

_LEAST_RUNS, _MOST_RUNS = 16, 96  # parallel iterations
_BLOCK_BYTES = 800 << 10  # of x
_MOST_TILES = 12  # in a block, if nothing else is asked for
_HEIGHT, _WIDTH = 2 * amx.ROWS, 2 * amx.PAIRS

# What a run of tasks remembers. SHAPE: the rows that the tiles are configured for, 0 if for none. Of the tile before,
# which waits in `acc`: UNIT, its first row tile; PANEL; ROWS, how many. Of the weights to prefetch: LINES in a step,
# AHEAD, how far into the panel and beyond. Of the task: TASK, its number, up to END; NEXT_UNIT, NEXT_PANEL, HEIGHT in
# rows; the others lead there. In memory, because nested `T.let`s of such arithmetic keep TVM's simplifier busy for
# seconds.
SHAPE, UNIT, PANEL, ROWS, LINES, AHEAD, TASK, END, NEXT_UNIT, NEXT_PANEL, HEIGHT, _FIRST, _IN_BLOCK, _WITHIN = range(14)
_REMEMBERED = 14


@dataclass(frozen=True)
class Run:
    """What a run of tasks works on; `extra` is the residual."""

    state: tvm.tirx.Buffer
    acc: tvm.tirx.Buffer
    shapes: tvm.tirx.Buffer
    x: tvm.tirx.Buffer
    weight: tvm.tirx.Buffer
    bias: tvm.tirx.Buffer
    extra: tvm.tirx.Buffer
    out: tvm.tirx.Buffer


def space(tiles: CpuTiles, *, k: int, x: RowFormat | None = None, **_options: object) -> Space:
    """The decisions of this kernel; how many tiles a block has by itself depends on what they take of L2."""
    x = x or RowFormat(k, bf16.STORAGE)
    usual = max(1, min(_MOST_TILES, _BLOCK_BYTES // (_HEIGHT * x.width * 2)))
    blocks = tuple(sorted({1, 2, 4, 8, 12, 24, usual}))
    return Space(
        (
            Knob("block_tiles", blocks, usual, "tiles that pass over a panel together"),
            Knob("ahead_kib", (16, 32, 48, 96, 192), 48, "KiB that a lone tile's prefetch is ahead"),
            Knob("run_tasks", (8, 16, 32), 16, "tasks of a parallel iteration; its last one is finished by itself"),
            Knob("finish_rows", (0, 4, 8), 0, "rows that a step finishes; 0: as few as will do"),
            Knob("near", (0, 1, 2), 0, "steps by which weights are also asked into L1; 0: not"),
            Knob("pack", (0, 1), 0, "rows to bf16: 0 by integer arithmetic, 1 by the CPU's conversion"),
        )
    )


def linear(
    tiles: CpuTiles,
    *,
    k: int,
    n: int,
    x: RowFormat,
    activation: str | None = None,
    residual: bool = False,
    norm_eps: float | None = None,
    extra: RowFormat | None = None,
    out: RowFormat | None = None,
    instructions: str = amx.LLVM,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, weight, bias, [residual,] [gamma, beta,] out)`, as `linear.linear` with x in bf16; k and its width are even.

    instructions: LLVM IR that defines the functions of `schedules/amx.py`. variants: settings of `space` by rows.
    """
    if tiles.col_tile != _WIDTH or _HEIGHT % tiles.row_tile or amx.ROWS % tiles.row_tile:
        raise ValueError(f"{tiles} does not fit AMX: panels of {_WIDTH} columns and row tiles that divide {amx.ROWS}")
    product = Product(k, n, activation, residual, x, extra or RowFormat(n), out or RowFormat(n))
    choices = space(tiles, k=k, x=x)
    multiply = by_rows(variants, choices, tiles.row_tile, lambda setting: _multiply_macro(tiles, product, setting))
    return product_kernel(tiles, product, norm_eps, multiply, CPU_LLVM + bf16.PACK_LLVM + instructions)


def _multiply_macro(tiles: CpuTiles, product: Product, setting: dict[str, int]) -> Macro:
    """`multiply(t, operands)`: steps 1 to 5 of the strategy for a batch of t row tiles."""
    n, residual, steps, x_rows, out_rows = product.n, product.residual, product.steps, product.x, product.out
    rows, columns, panels, units = tiles.row_tile, tiles.col_tile, tiles.panels(n), _HEIGHT // tiles.row_tile
    whole_steps, rest_pairs = steps // amx.PAIRS, steps % amx.PAIRS
    rows_a_step = max(-(-_HEIGHT // max(whole_steps, 1)), setting["finish_rows"])
    lines_a_step = amx.PAIRS * columns // CACHE_LINE_FLOATS
    block_tiles, run_tasks, near = setting["block_tiles"], setting["run_tasks"], setting["near"]
    pack = bool(setting["pack"]) and out_rows.dtype == bf16.STORAGE
    whole_panels, tail_columns, has_tail = n // columns, n % columns, n % columns != 0
    activate = activation_by_name(product.activation, out_rows.dtype)

    def add_residual(value: Expr, buffer: tvm.tirx.Buffer, tile: Expr, row: Expr, column: Expr) -> Expr:
        return value + bf16.load(buffer, tile, row, column) if residual else value

    def finished_vector(run: Run, unit: Expr, row: Expr, r: Expr, column: Expr, v: Expr) -> Expr:
        """16 neighbours of a row: bias, activation and residual applied."""
        ramp = T.ramp(column + v, 1, amx.PAIRS)
        value = activate(run.acc[r, T.ramp(v, 1, amx.PAIRS)] + run.bias[ramp])
        return add_residual(value, run.extra, unit, row, ramp)

    @T.inline
    def clear(both):
        amx.zero(0)
        amx.zero(1)
        if both:
            amx.zero(2)
            amx.zero(3)

    @T.inline
    def restore(both, acc):
        amx.load(0, acc, 0, columns)
        amx.load(1, acc, amx.PAIRS, columns)
        if both:
            amx.load(2, acc, amx.ROWS * columns, columns)
            amx.load(3, acc, amx.ROWS * columns + amx.PAIRS, columns)

    @T.inline
    def save(both, acc):
        amx.store(0, acc, 0, columns)
        amx.store(1, acc, amx.PAIRS, columns)
        if both:
            amx.store(2, acc, amx.ROWS * columns, columns)
            amx.store(3, acc, amx.ROWS * columns + amx.PAIRS, columns)

    @T.inline
    def multiply_tiles(both, run, row, panel, i):
        amx.load(6, run.weight, (panel * steps + i * amx.PAIRS) * columns, columns)
        amx.load(7, run.weight, (panel * steps + i * amx.PAIRS) * columns + amx.PAIRS, columns)
        amx.load(4, run.x, row * x_rows.width + i * (2 * amx.PAIRS), x_rows.width)
        amx.dot(0, 4, 6)
        amx.dot(1, 4, 7)
        if both:
            amx.load(5, run.x, (row + amx.ROWS) * x_rows.width + i * (2 * amx.PAIRS), x_rows.width)
            amx.dot(2, 5, 6)
            amx.dot(3, 5, 7)

    @T.inline
    def prefetch(run, panel, i):
        for line in range(run.state[LINES]):
            prefetch_read(
                run.weight,
                (panel * steps * columns + run.state[AHEAD]) + (i * run.state[LINES] + line) * CACHE_LINE_FLOATS,
            )

    @T.inline
    def store_packed(run, unit, row, r):
        column = T.meta_var(run.state[PANEL] * columns)
        for v in T.unroll(columns // amx.PAIRS):
            run.out[unit, row, T.ramp(column + v * amx.PAIRS, 1, amx.PAIRS)] = bf16.packed(
                finished_vector(run, unit, row, r, column, v * amx.PAIRS)
            )

    @T.inline
    def store(run, unit, row, r):
        for c in T.vectorized(columns):
            run.out[unit, row, run.state[PANEL] * columns + c] = bf16.stored(
                run.out,
                add_residual(
                    activate(run.acc[r, c] + run.bias[run.state[PANEL] * columns + c]),
                    run.extra,
                    unit,
                    row,
                    run.state[PANEL] * columns + c,
                ),
            )

    @T.inline
    def store_whole(run, unit, row, r):
        if pack:
            store_packed(run, unit, row, r)
        else:
            store(run, unit, row, r)

    @T.inline
    def store_tail(run, unit, row, r):
        for c in T.vectorized(columns):
            run.acc[r, c] = activate(run.acc[r, c] + run.bias[whole_panels * columns + c])
        for c in range(tail_columns):
            run.out[unit, row, whole_panels * columns + c] = bf16.stored(
                run.out, add_residual(run.acc[r, c], run.extra, unit, row, whole_panels * columns + c)
            )

    @T.inline
    def finish_row(run, r):
        unit = T.meta_var(run.state[UNIT] + r // rows)
        row = T.meta_var(r % rows)
        if has_tail:
            if run.state[PANEL] < whole_panels:
                store_whole(run, unit, row, r)
            else:
                store_tail(run, unit, row, r)
        else:
            store_whole(run, unit, row, r)

    @T.inline
    def finish_some(run, i):
        for r in range(T.min(i * rows_a_step, run.state[ROWS]), T.min((i + 1) * rows_a_step, run.state[ROWS])):
            finish_row(run, r)

    @T.inline
    def locate(state, t, count):
        state[_FIRST] = state[TASK] // (block_tiles * panels) * block_tiles
        state[_IN_BLOCK] = T.min(count - state[_FIRST], T.int64(block_tiles))
        state[_WITHIN] = state[TASK] - state[_FIRST] * panels
        state[NEXT_PANEL] = state[_WITHIN] // state[_IN_BLOCK]
        state[_WITHIN] = state[_WITHIN] - state[NEXT_PANEL] * state[_IN_BLOCK]
        state[NEXT_UNIT] = (state[_FIRST] + state[_WITHIN]) * units
        state[HEIGHT] = T.min(t - state[NEXT_UNIT], T.int64(units)) * rows
        state[LINES] = (lines_a_step + state[_IN_BLOCK] - 1) // state[_IN_BLOCK]
        if state[_IN_BLOCK] == 1:
            state[AHEAD] = T.int64((setting["ahead_kib"] << 10) // 4)
        else:
            state[AHEAD] = steps * columns + state[_WITHIN] * whole_steps * state[LINES] * CACHE_LINE_FLOATS

    @T.inline
    def accumulate(both, run):
        height = T.meta_var(run.state[HEIGHT])
        row = T.meta_var(run.state[NEXT_UNIT] * rows)
        panel = T.meta_var(run.state[NEXT_PANEL])
        upper = T.meta_var(T.int64(amx.ROWS) if both else height)
        lower = T.meta_var(height - amx.ROWS if both else T.int64(0))
        if whole_steps > 0:
            if run.state[SHAPE] != height:
                amx.configure(run.shapes, upper, lower, amx.PAIRS)
                run.state[SHAPE] = height
            clear(both)
            for i in range(whole_steps):
                prefetch(run, panel, i)
                if near > 0:
                    for line in T.unroll(lines_a_step):
                        prefetch_near(
                            run.weight,
                            (panel * steps + (i + near) * amx.PAIRS) * columns + line * CACHE_LINE_FLOATS,
                        )
                multiply_tiles(both, run, row, panel, i)
                finish_some(run, i)
            save(both, run.acc)
        else:
            for r in range(run.state[ROWS]):
                finish_row(run, r)
        if rest_pairs > 0:
            amx.configure(run.shapes, upper, lower, rest_pairs)
            run.state[SHAPE] = 0
            if whole_steps > 0:
                restore(both, run.acc)
            else:
                clear(both)
            multiply_tiles(both, run, row, panel, whole_steps)
            save(both, run.acc)

    @T.inline
    def multiply(t, operands):
        count: T.let = (t + units - 1) // units
        most: T.let = T.max(T.min(count * panels // run_tasks, T.int64(_MOST_RUNS)), T.int64(_LEAST_RUNS))
        runs: T.let = T.min(count * panels, most)
        for index in T.parallel(runs):
            with T.sblock("run"):
                T.reads()
                T.writes()
                acc = T.sblock_alloc_buffer((_HEIGHT, columns), "float32")
                shapes = T.sblock_alloc_buffer((8,), "int64")
                state = T.sblock_alloc_buffer((_REMEMBERED,), "int64")
                run = T.meta_var(
                    Run(state, acc, shapes, operands.x, operands.weight, operands.bias, operands.extra, operands.out)
                )
                state[ROWS] = T.int64(0)
                state[SHAPE] = T.int64(0)
                state[TASK] = index * (count * panels) // runs
                state[END] = (index + 1) * (count * panels) // runs
                for _ in range(state[END] - state[TASK]):
                    locate(state, t, count)
                    if state[HEIGHT] > amx.ROWS:
                        accumulate(True, run)
                    else:
                        accumulate(False, run)
                    state[UNIT] = state[NEXT_UNIT]
                    state[PANEL] = state[NEXT_PANEL]
                    state[ROWS] = state[HEIGHT]
                    state[TASK] = state[TASK] + 1
                for r in range(state[ROWS]):
                    finish_row(run, r)
                amx.release()

    return multiply
