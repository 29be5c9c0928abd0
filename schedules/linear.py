"""The matrix kernel on the CPU, `norm(activation(x @ W + bias) + residual)` in one call, fp32 or bf16.

Shapes: x `(t, R, k)`, weight `(P, k, C)`, bias `(P * C,)`, residual and out `(t, R, n)`, gamma and beta `(n,)`. t is
symbolic; R = `tiles.row_tile`, C = `tiles.col_tile`, P = `tiles.panels(n)`. A panel is C columns of W, one row of them
per k; the last panel and the bias are padded with zeros. In bf16, x holds bf16 and the weight pairs of them along k,
`(P, k / 2, C)` int32 (`schedules/bf16.py`); everything is accumulated in fp32, bias, gamma and beta are fp32, and
residual and out may be either.

Strategy
1. A task is one register tile of the output, H x C with H of up to `tiles.tile_rows` rows: H * C accumulators in
   registers, rows unrolled, columns vectorised, one pass over k, and per k one load of C weights and H broadcasts of x
   (24 FMAs for 12 x 32 on AVX-512; in bf16 24 products of pairs). The tiles of a batch differ by one row tile at most:
   a short request does not pay for rows that it does not have.
2. Tasks are numbered row block, panel, tile within the block, and the thread pool hands out contiguous runs of numbers:
   the load is even to one tile, a large batch splits by rows, a small one by panels. In a row block of at most
   `_BLOCK_ROWS` rows a panel stays in L2 while the tiles pass over it. Blocks are of equal size, so that none is left
   with a single tile that reads all weights for itself. Splitting whole row blocks over the threads was rejected: 11
   tiles on 2 threads come out as 8 + 3.
3. Weights are prefetched into L2. With one tile per panel, `AHEAD_ELEMENTS` ahead: panels lie one after another, so
   this runs on into the next one. With several, one panel ahead, each tile asking for its share: arithmetic hides the
   memory. The hardware's prefetchers stop at every 4 KB page: without this a single tile, which is bound by memory,
   reads at two thirds of the speed. The lines of the residual and of the output are asked for along the way, one per
   group of steps: all at once they keep the weights waiting (Granite Rapids: 10 % slower with a residual).
4. Bias, activation and residual apply to the tile in registers. If n is no multiple of C, those columns of the last
   panel that exist are copied one by one.
5. The norm needs whole rows: a second parallel loop normalises `out` in place. Counting the finished panels of a row,
   so that the task that finishes the last one normalises it at once, was rejected: where panels are split over threads,
   that is always the same thread.

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

from collections.abc import Callable

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules import bf16
from turbo_tvm.schedules.linear_tasks import GROUP, IN_BLOCK, MISSING, PANEL, PLACES, UNIT, locate_macro, next_row
from turbo_tvm.schedules.normalization import normalize_all_macro
from turbo_tvm.schedules.rows import RowFormat
from turbo_tvm.schedules.script import (
    CACHE_LINE_FLOATS,
    CPU_LLVM,
    prefetch_read,
    without_parameters,
)
from turbo_tvm.schedules.tiles import CpuTiles
from turbo_tvm.schedules.vector_math import activation as activation_by_name

_BLOCK_ROWS = 192

Macro = Callable[..., None]


def linear(
    tiles: CpuTiles,
    *,
    k: int,
    n: int,
    activation: str | None = None,
    residual: bool = False,
    norm_eps: float | None = None,
    x: RowFormat | None = None,
    extra: RowFormat | None = None,
    out: RowFormat | None = None,
) -> tvm.tirx.PrimFunc:
    """`(x, weight, bias, [residual,] [gamma, beta,] out)`; gamma, beta and the norm if `norm_eps` is given.

    x, extra, out: how x, the residual and out are stored, by default fp32 and k, n and n columns wide. x in bf16 makes
    it a product of bf16 numbers; k and the width of x are then even.
    """
    x_rows, extra_rows, out_rows = x or RowFormat(k), extra or RowFormat(n), out or RowFormat(n)
    in_bf16 = x_rows.dtype == bf16.STORAGE
    rows, columns, panels, units = tiles.row_tile, tiles.col_tile, tiles.panels(n), tiles.tile_units
    block_tiles, lines = max(1, _BLOCK_ROWS // tiles.tile_rows), max(1, columns // CACHE_LINE_FLOATS)
    whole_panels, tail_columns, has_tail = n // columns, n % columns, n % columns != 0
    normalized = norm_eps is not None
    activate = activation_by_name(activation, out_rows.dtype)
    normalize_all = normalize_all_macro(tiles.lanes, n, norm_eps or 0.0)
    steps, weight_type = (k // 2, bf16.PAIR) if in_bf16 else (k, "float32")
    locate = locate_macro(units, panels, steps, columns)
    step = _bf16_step(tiles) if in_bf16 else _fp32_step(tiles)

    def add_residual(value: Expr, buffer: tvm.tirx.Buffer, tile: Expr, row: Expr, column: Expr) -> Expr:
        return value + bf16.load(buffer, tile, row, column) if residual else value

    @T.inline
    def start(acc, bias, panel):
        for r in T.unroll(acc.shape[0]):
            for c in T.vectorized(columns):
                acc[r, c] = bias[panel * columns + c]

    @T.inline
    def store(acc, extra, out, unit, first_row, panel):
        for r in T.unroll(acc.shape[0]):
            for c in T.vectorized(columns):
                out[unit + (first_row + r) // rows, (first_row + r) % rows, panel * columns + c] = bf16.stored(
                    out,
                    add_residual(
                        activate(acc[r, c]),
                        extra,
                        unit + (first_row + r) // rows,
                        (first_row + r) % rows,
                        panel * columns + c,
                    ),
                )

    @T.inline
    def store_tail(acc, extra, out, unit, first_row):
        for r in range(acc.shape[0]):
            for c in T.vectorized(columns):
                acc[r, c] = activate(acc[r, c])
            for c in range(tail_columns):
                out[unit + (first_row + r) // rows, (first_row + r) % rows, whole_panels * columns + c] = bf16.stored(
                    out,
                    add_residual(
                        acc[r, c],
                        extra,
                        unit + (first_row + r) // rows,
                        (first_row + r) % rows,
                        whole_panels * columns + c,
                    ),
                )

    @T.inline
    def prefetch_rows(buffer, layout, height, unit, panel, group):
        per_line = T.meta_var(min(layout.line, columns))
        if group < height * (columns // per_line):
            prefetch_read(
                buffer,
                (unit * rows + group // (columns // per_line)) * layout.width
                + panel * columns
                + group % (columns // per_line) * per_line,
            )

    @T.inline
    def compute_tile(height, place, x, weight, bias, extra, out):
        with T.sblock("tile"):
            T.reads()
            T.writes()
            unit = T.meta_var(place[UNIT])
            panel = T.meta_var(place[PANEL])
            upper = T.sblock_alloc_buffer((height // 2, columns), "float32")
            lower = T.sblock_alloc_buffer((height // 2, columns), "float32")
            start(upper, bias, panel)
            start(lower, bias, panel)
            for group in range(steps // GROUP):
                for line in T.unroll(lines):
                    prefetch_read(weight, next_row(place, group) * columns + line * CACHE_LINE_FLOATS)
                if place[IN_BLOCK] < GROUP:  # fewer tiles than steps: a row for each step
                    for line in T.unroll((GROUP - 1) * lines):
                        prefetch_read(weight, (next_row(place, group) + 1) * columns + line * CACHE_LINE_FLOATS)
                if residual:
                    prefetch_rows(extra, extra_rows, height, unit, panel, group)
                prefetch_rows(out, out_rows, height, unit, panel, group)
                for i in T.unroll(GROUP):
                    step(upper, x, weight, unit, 0, panel, group * GROUP + i)
                    step(lower, x, weight, unit, height // 2, panel, group * GROUP + i)
            for i in range(steps % GROUP):
                step(upper, x, weight, unit, 0, panel, steps // GROUP * GROUP + i)
                step(lower, x, weight, unit, height // 2, panel, steps // GROUP * GROUP + i)
            if has_tail:
                if panel < whole_panels:
                    store(upper, extra, out, unit, 0, panel)
                    store(lower, extra, out, unit, height // 2, panel)
                else:
                    store_tail(upper, extra, out, unit, 0)
                    store_tail(lower, extra, out, unit, height // 2)
            else:
                store(upper, extra, out, unit, 0, panel)
                store(lower, extra, out, unit, height // 2, panel)

    @T.inline
    def compute(height_units, again, place, x, weight, bias, extra, out):
        if height_units == 1:
            compute_tile(rows, place, x, weight, bias, extra, out)
        else:
            if place[MISSING] == units - height_units:
                compute_tile(height_units * rows, place, x, weight, bias, extra, out)
            else:
                again(height_units - 1, again, place, x, weight, bias, extra, out)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        weight: T.Buffer((panels, steps, columns), weight_type),
        bias: T.Buffer((panels * columns,), "float32"),
        residual_arg: T.handle,
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, x_rows.width), x_rows.dtype)
        residual_rows = T.match_buffer(residual_arg, (t, rows, extra_rows.width), extra_rows.dtype)
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", CPU_LLVM + (bf16.DOT_LLVM if in_bf16 else "")):
            count: T.let = (t + units - 1) // units
            blocks: T.let = (count + block_tiles - 1) // block_tiles
            for task in T.parallel(count * panels):
                with T.sblock("task"):
                    T.reads()
                    T.writes()
                    place = T.sblock_alloc_buffer((PLACES,), "int64")
                    locate(place, task, t, count, blocks)
                    compute(units, compute, place, source, weight, bias, residual_rows, result)
            if normalized:
                normalize_all(result, None, result, gamma, beta)

    absent = [] if residual else ["residual_rows"]
    return without_parameters(kernel, absent if normalized else [*absent, "gamma", "beta"])


def _fp32_step(tiles: CpuTiles) -> Macro:
    """`step(acc, x, weight, unit, first_row, panel, i)`: acc += column i of x times row i of the panel."""
    rows, columns = tiles.row_tile, tiles.col_tile

    @T.inline
    def step(acc, x, weight, unit, first_row, panel, i):
        for r in T.unroll(acc.shape[0]):
            for c in T.vectorized(columns):
                acc[r, c] = (
                    acc[r, c] + x[unit + (first_row + r) // rows, (first_row + r) % rows, i] * weight[panel, i, c]
                )

    return step


def _bf16_step(tiles: CpuTiles) -> Macro:
    """The same for pair i of the columns of x and of the rows of the panel."""
    rows, columns, lanes = tiles.row_tile, tiles.col_tile, tiles.lanes

    @T.inline
    def step(acc, x, weight, unit, first_row, panel, i):
        with T.sblock("pairs"):
            T.reads()
            T.writes()
            pairs = T.decl_buffer((x.shape[0], rows, x.shape[2] // 2), bf16.PAIR, data=x.data)
            for r in T.unroll(acc.shape[0]):
                for v in T.unroll(columns // lanes):
                    acc[r, T.ramp(v * lanes, 1, lanes)] = bf16.dot(
                        acc[r, T.ramp(v * lanes, 1, lanes)],
                        T.broadcast(pairs[unit + (first_row + r) // rows, (first_row + r) % rows, i], lanes),
                        weight[panel, i, T.ramp(v * lanes, 1, lanes)],
                    )

    return step
