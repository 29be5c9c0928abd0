"""The bf16 matrix kernel on CPUs with Intel AMX: `linear.py` with tile instructions.

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

Steps 1, 3 and 4 are in `linear_amx_tile.py`, 2 and 6 in `linear_amx_finish.py`, 5 in `linear_amx_run.py`, the norm in
`linear_product.py`.

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

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Linear
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.linear_amx_finish import finish_row_macro
from turbo_tvm.schedules.cpu.linear_amx_run import (
    END,
    HEIGHT,
    NEXT_PANEL,
    NEXT_ROWS,
    NEXT_UNIT,
    PANEL,
    REMEMBERED,
    ROWS,
    SHAPE,
    TASK,
    UNIT,
    WIDTH,
    AmxBlocking,
    Run,
    locate_macro,
)
from turbo_tvm.schedules.cpu.linear_amx_tile import accumulate_macro
from turbo_tvm.schedules.cpu.linear_product import Product, product_kernel
from turbo_tvm.schedules.cpu.script import CPU_LLVM
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

_LEAST_RUNS, _MOST_RUNS = 16, 96  # parallel iterations
_BLOCK_BYTES = 800 << 10  # of x
_MOST_TILES = 12  # in a block, if nothing else is asked for


def refuses(operator: Linear, tiles: CpuTiles) -> str:
    """Return why this kernel does not run a product, "" if it does."""
    return "" if tiles.amx and operator.x.dtype == bf16.STORAGE else "it is no product of bf16 numbers on AMX"


def space(operator: Linear, _tiles: CpuTiles) -> Space:
    """Return the decisions of this kernel; how many tiles a block has by itself depends on what they take of L2."""
    usual = max(1, min(_MOST_TILES, _BLOCK_BYTES // (HEIGHT * operator.x.width * 2)))
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
    operator: Linear, tiles: CpuTiles, variants: Sequence[Variant] = (), instructions: str = amx.LLVM
) -> tvm.tirx.PrimFunc:
    """Return `(x, weight, bias, [residual,] [gamma, beta,] out)`, as `linear.linear` with x in bf16.

    k and the width of x are even. variants: settings of `space` by rows. instructions: LLVM IR that defines the
    functions of `amx.py`.
    """
    if tiles.col_tile != WIDTH or HEIGHT % tiles.row_tile or amx.ROWS % tiles.row_tile:
        raise ValueError(f"{tiles} does not fit AMX: panels of {WIDTH} columns and row tiles that divide {amx.ROWS}")
    product, choices = Product.of(operator), space(operator, tiles)
    multiply = by_rows(
        variants, choices, tiles.row_tile, lambda setting: _multiply_macro(AmxBlocking(tiles, product, setting))
    )
    return product_kernel(tiles, product, operator.norm_eps, multiply, CPU_LLVM + bf16.PACK_LLVM + instructions)


def _multiply_macro(cut: AmxBlocking) -> Macro:
    """`multiply(t, operands)`: steps 1 to 5 of the strategy for a batch of t row tiles."""
    panels, units, run_tasks = cut.panels, cut.units, cut.setting["run_tasks"]
    do_task, finish_row = _task_macro(cut), finish_row_macro(cut)

    @T.inline
    def multiply(t, operands):
        count: T.let = (t + units - 1) // units
        most: T.let = T.max(T.min(count * panels // run_tasks, T.int64(_MOST_RUNS)), T.int64(_LEAST_RUNS))
        runs: T.let = T.min(count * panels, most)
        # 2. a parallel iteration is a run of tasks
        for index in T.parallel(runs):
            with T.sblock("run"):
                T.reads()
                T.writes()
                acc = T.sblock_alloc_buffer((HEIGHT, WIDTH), "float32")
                shapes = T.sblock_alloc_buffer((8,), "int64")
                state = T.sblock_alloc_buffer((REMEMBERED,), "int64")
                run = T.meta_var(Run(state, acc, shapes, operands))
                state[ROWS] = T.int64(0)
                state[SHAPE] = T.int64(0)
                state[TASK] = index * (count * panels) // runs
                state[END] = (index + 1) * (count * panels) // runs
                for _ in range(state[END] - state[TASK]):
                    do_task(run, t, count)
                # 2. nobody comes after the last tile
                for r in range(state[ROWS]):
                    finish_row(run, r)
                amx.release()

    return multiply


def _task_macro(cut: AmxBlocking) -> Macro:
    """`do_task(run, t, count)`: the products of a task, while the tile before is finished; then its own waits."""
    locate, accumulate = locate_macro(cut), accumulate_macro(cut)

    @T.inline
    def do_task(run, t, count):
        state = T.meta_var(run.state)
        # 5. which tile this is, and what it prefetches
        locate(state, t, count)
        # 1. the products; 3. a tile of at most 16 rows does without the lower half
        if state[NEXT_ROWS] > amx.ROWS:
            accumulate(True, run)
        else:
            accumulate(False, run)
        state[UNIT] = state[NEXT_UNIT]
        state[PANEL] = state[NEXT_PANEL]
        state[ROWS] = state[NEXT_ROWS]
        state[TASK] = state[TASK] + 1

    return do_task
