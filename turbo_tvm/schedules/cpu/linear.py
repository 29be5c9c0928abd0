"""The matrix kernel on the CPU, `norm(activation(x @ W + bias) + residual)` in one call, fp32 or bf16.

Shapes: x `(t, R, k)`, weight `(P, k, C)`, bias `(P * C,)`, residual and out `(t, R, n)`, gamma and beta `(n,)`. t is
symbolic; R = `tiles.row_tile`, C = `tiles.col_tile`, P = `tiles.panels(n)`. A panel is C columns of W, one row of them
per k; the last panel and the bias are padded with zeros. In bf16, x holds bf16 and the weight pairs of them along k,
`(P, k / 2, C)` int32 (`bf16.py`); everything is accumulated in fp32, bias, gamma and beta are fp32, and
residual and out may be either.

Strategy
1. A task is one register tile of the output, H x C with H of up to `tiles.tile_rows` rows: H * C accumulators in
   registers, rows unrolled, columns vectorised, one pass over k, and per k one load of C weights and H broadcasts of x
   (24 FMAs for 12 x 32 on AVX-512; in bf16 24 products of pairs). The tiles of a batch differ by one row tile at most:
   a short request does not pay for rows that it does not have.
2. Tasks are numbered row block, panel, tile within the block, and the thread pool hands out contiguous runs of numbers:
   the load is even to one tile, a large batch splits by rows, a small one by panels. In a row block of at most
   `block_rows` rows a panel stays in L2 while the tiles pass over it. Blocks are of equal size, so that none is left
   with a single tile that reads all weights for itself. Splitting whole row blocks over the threads was rejected: 11
   tiles on 2 threads come out as 8 + 3.
3. Weights are prefetched into L2. With one tile per panel, `ahead` elements ahead: panels lie one after another, so
   this runs on into the next one. With several, one panel ahead, each tile asking for its share: arithmetic hides the
   memory. The hardware's prefetchers stop at every 4 KB page: without this a single tile, which is bound by memory,
   reads at two thirds of the speed. The lines of the residual and of the output are asked for along the way, one per
   group of steps: all at once they keep the weights waiting (Granite Rapids: 10 % slower with a residual).
4. Bias, activation and residual apply to the tile in registers. If n is no multiple of C, those columns of the last
   panel that exist are copied one by one.
5. The norm needs whole rows: a second parallel loop normalises `out` in place. Counting the finished panels of a row,
   so that the task that finishes the last one normalises it at once, was rejected: where panels are split over threads,
   that is always the same thread.

Step 2 is in `linear_tasks.py`, 3 in `linear_prefetch.py`, 1 and 4 in `linear_tile.py`, 5 in `linear_product.py`.

The accumulators are two buffers, because TVM keeps "global" buffers below 1 KB, and no others, on the stack: a call to
the workspace pool costs 50 ns. `T.let`, because a plain assignment in TVMScript makes such a call as well.

Rejected after measuring (Zen 5): row blocks of 96, 144 and 288 rows, prefetching x (no gain); prefetching the lines to
be written all at once (2 to 4 % slower at 768 x 768), or the weights into L1 (10 % slower in bf16); 6 x 64 (slower
where bound by memory); 14 x 32 (1 % faster, but rounds short requests up further). On Granite Rapids, with the
prefetches spread over groups of 4 steps, 1,024 rows take 2 to 9 % less time than with a prefetch per step and bursts;
6 x 64 gains nothing there either.

Method: Goto, van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with W packed
beforehand, and neither k blocked nor x packed: x has so few columns that a block of its rows fits L2.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Linear
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.linear_blocking import Blocking
from turbo_tvm.schedules.cpu.linear_product import Product, product_kernel
from turbo_tvm.schedules.cpu.linear_tasks import MISSING, PLACES, locate_macro
from turbo_tvm.schedules.cpu.linear_tile import compute_tile_macro
from turbo_tvm.schedules.cpu.script import CPU_LLVM
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(_operator: Linear, tiles: CpuTiles) -> Space:
    """Return the decisions of this kernel."""
    return Space(
        (
            Knob("block_rows", (24, 48, 96, 192, 384, 768), 192, "rows that pass over a panel together"),
            Knob("tile_units", tuple(range(1, tiles.tile_units + 1)), tiles.tile_units, "row tiles of a register tile"),
            Knob("group", (2, 4, 8), 4, "steps of k that are spelt out and prefetch together"),
            Knob("ahead", (1024, 2048, 4096, 8192, 16384), 4096, "elements that a lone tile's prefetch is ahead"),
            Knob("near", (0, 2, 4, 8, 16), 0, "steps by which weights are also asked into L1; 0: not"),
            Knob("touch_rows", (0, 1), 1, "whether the lines of residual and output are asked for"),
        )
    )


def linear(operator: Linear, tiles: CpuTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(x, weight, bias, [residual,] [gamma, beta,] out)`; gamma, beta and the norm if there is a `norm_eps`.

    x in bf16 makes it a product of bf16 numbers; k and the width of x are then even. variants: settings of `space` by
    rows.
    """
    product = Product.of(operator)
    multiply = by_rows(
        variants,
        space(operator, tiles),
        tiles.row_tile,
        lambda setting: _multiply_macro(Blocking(tiles, product, setting)),
    )
    return product_kernel(
        tiles, product, operator.norm_eps, multiply, CPU_LLVM + (bf16.DOT_LLVM if product.in_bf16 else "")
    )


def _multiply_macro(cut: Blocking) -> Macro:
    """`multiply(t, operands)`: steps 1 to 4 of the strategy for a batch of t row tiles."""
    rows, units, block_tiles, panels = cut.rows, cut.units, cut.block_tiles, cut.panels
    locate, compute_tile = locate_macro(cut.tasks), compute_tile_macro(cut)

    @T.inline
    def compute(height_units, again, place, operands):
        if height_units == 1:
            compute_tile(rows, place, operands)
        else:
            if place[MISSING] == units - height_units:
                compute_tile(height_units * rows, place, operands)
            else:
                again(height_units - 1, again, place, operands)

    @T.inline
    def multiply(t, operands):
        # 2. number the tasks: row block, panel, tile within the block
        count: T.let = (t + units - 1) // units
        blocks: T.let = (count + block_tiles - 1) // block_tiles
        for task in T.parallel(count * panels):
            with T.sblock("task"):
                T.reads()
                T.writes()
                place = T.sblock_alloc_buffer((PLACES,), "int64")
                locate(place, task, t, count, blocks)
                # 1. a task is a register tile, of one of `units` heights
                compute(units, compute, place, operands)

    return multiply
