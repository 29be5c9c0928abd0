"""The bf16 matrix kernel on CPUs with Intel AMX: `schedules/linear.py` with tile instructions.

Shapes and parameters are those of `linear.linear` with x in bf16, weights packed in pairs along k.

Strategy
1. A task is 32 rows x 32 columns of the output, the accumulators of four tiles, in one pass over k. A step is 32 of k:
   two tiles of x and two of the weight are loaded and multiplied each with each, four products for four loads.
2. The last tile of a batch has the rows that are left, a multiple of R. An instruction takes as long as its tile has
   rows, so they need not be spread evenly; a tile of at most 16 rows does without the lower half.
3. What k leaves over 32 is one step more, of smaller tiles: the accumulators pass through memory, because configuring
   clears all tiles. Nothing is read beyond k.
4. The accumulators go through `acc`, 4 KB that stay in L1, from where bias, activation and residual apply to them. If n
   is no multiple of 32, those columns of the last panel that exist are copied one by one.
5. Tasks are numbered row block, panel, tile within the block: a panel stays in L2 while the tiles of a block pass over
   it.
6. The norm needs whole rows: a second parallel loop normalises `out` in place.

Speed is unmeasured: there was no CPU with AMX to run on. The blocking is that of Intel's optimisation manual (chapter
"Intel AMX": 2 x 2 accumulators); prefetches, which `linear.py` has, were left out until they can be measured. Its
results were compared with an emulation of the instructions (`tests/schedules/test_linear_amx.py`).
"""

from __future__ import annotations

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules import amx, bf16
from turbo_tvm.schedules.normalization import normalize_all_macro
from turbo_tvm.schedules.rows import RowFormat
from turbo_tvm.schedules.script import CACHE_LINE_FLOATS, CPU_LLVM, prefetch_read, without_parameters
from turbo_tvm.schedules.tiles import CpuTiles
from turbo_tvm.schedules.vector_math import activation as activation_by_name

_CHUNKS = 16
_BLOCK_BYTES = 800 << 10  # of x
_MOST_TILES = 12
_AHEAD_BYTES = 49152
_HEIGHT, _WIDTH = 2 * amx.ROWS, 2 * amx.PAIRS

# What a run of tasks remembers. SHAPE: the rows that the tiles are configured for, 0 if for none. Of the tile before,
# which waits in the accumulators: UNIT, its first row tile; PANEL; ROWS, how many; SIDE, their first row in `acc`. Of
# the weights to prefetch: LINES in a step, AHEAD, how far into the panel and beyond.
SHAPE, UNIT, PANEL, ROWS, SIDE, LINES, AHEAD = range(7)
_RUN = 7


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
) -> tvm.tirx.PrimFunc:
    """`(x, weight, bias, [residual,] [gamma, beta,] out)`, as `linear.linear` with x in bf16; k and its width are even.

    instructions: LLVM IR that defines the functions of `schedules/amx.py`.
    """
    if tiles.col_tile != _WIDTH or _HEIGHT % tiles.row_tile or amx.ROWS % tiles.row_tile:
        raise ValueError(f"{tiles} does not fit AMX: panels of {_WIDTH} columns and row tiles that divide {amx.ROWS}")
    x_rows, extra_rows, out_rows = x, extra or RowFormat(n), out or RowFormat(n)
    rows, columns, panels, units = tiles.row_tile, tiles.col_tile, tiles.panels(n), _HEIGHT // tiles.row_tile
    steps = k // 2
    whole_steps, rest_pairs = steps // amx.PAIRS, steps % amx.PAIRS
    rows_a_step = -(-_HEIGHT // max(whole_steps, 1))
    lines_a_step = amx.PAIRS * columns // CACHE_LINE_FLOATS
    block_tiles = max(1, min(_MOST_TILES, _BLOCK_BYTES // (_HEIGHT * x_rows.width * 2)))
    whole_panels, tail_columns, has_tail = n // columns, n % columns, n % columns != 0
    normalized = norm_eps is not None
    activate = activation_by_name(activation, out_rows.dtype)
    normalize_all = normalize_all_macro(tiles.lanes, n, norm_eps or 0.0)

    def add_residual(value: Expr, buffer: tvm.tirx.Buffer, tile: Expr, row: Expr, column: Expr) -> Expr:
        return value + bf16.load(buffer, tile, row, column) if residual else value

    @T.inline
    def clear(both):
        amx.zero(0)
        amx.zero(1)
        if both:
            amx.zero(2)
            amx.zero(3)

    @T.inline
    def restore(both, acc, side):
        amx.load(0, acc, side * columns, columns)
        amx.load(1, acc, side * columns + amx.PAIRS, columns)
        if both:
            amx.load(2, acc, (side + amx.ROWS) * columns, columns)
            amx.load(3, acc, (side + amx.ROWS) * columns + amx.PAIRS, columns)

    @T.inline
    def save(both, acc, side):
        amx.store(0, acc, side * columns, columns)
        amx.store(1, acc, side * columns + amx.PAIRS, columns)
        if both:
            amx.store(2, acc, (side + amx.ROWS) * columns, columns)
            amx.store(3, acc, (side + amx.ROWS) * columns + amx.PAIRS, columns)

    @T.inline
    def multiply(both, x, weight, row, panel, i):
        amx.load(6, weight, (panel * steps + i * amx.PAIRS) * columns, columns)
        amx.load(7, weight, (panel * steps + i * amx.PAIRS) * columns + amx.PAIRS, columns)
        amx.load(4, x, row * x_rows.width + i * (2 * amx.PAIRS), x_rows.width)
        amx.dot(0, 4, 6)
        amx.dot(1, 4, 7)
        if both:
            amx.load(5, x, (row + amx.ROWS) * x_rows.width + i * (2 * amx.PAIRS), x_rows.width)
            amx.dot(2, 5, 6)
            amx.dot(3, 5, 7)

    @T.inline
    def prefetch(run, weight, panel, i):
        for line in range(run[LINES]):
            prefetch_read(
                weight, (panel * steps * columns + run[AHEAD]) + (i * run[LINES] + line) * CACHE_LINE_FLOATS
            )

    @T.inline
    def store(run, acc, bias, extra, out, unit, row, r):
        for c in T.vectorized(columns):
            out[unit, row, run[PANEL] * columns + c] = bf16.stored(
                out,
                add_residual(
                    activate(acc[run[SIDE] + r, c] + bias[run[PANEL] * columns + c]),
                    extra,
                    unit,
                    row,
                    run[PANEL] * columns + c,
                ),
            )

    @T.inline
    def store_tail(run, acc, bias, extra, out, unit, row, r):
        for c in T.vectorized(columns):
            acc[run[SIDE] + r, c] = activate(acc[run[SIDE] + r, c] + bias[whole_panels * columns + c])
        for c in range(tail_columns):
            out[unit, row, whole_panels * columns + c] = bf16.stored(
                out, add_residual(acc[run[SIDE] + r, c], extra, unit, row, whole_panels * columns + c)
            )

    @T.inline
    def finish_row(run, acc, bias, extra, out, r):
        unit = T.meta_var(run[UNIT] + r // rows)
        row = T.meta_var(r % rows)
        if has_tail:
            if run[PANEL] < whole_panels:
                store(run, acc, bias, extra, out, unit, row, r)
            else:
                store_tail(run, acc, bias, extra, out, unit, row, r)
        else:
            store(run, acc, bias, extra, out, unit, row, r)

    @T.inline
    def finish_some(run, acc, bias, extra, out, i):
        for r in range(T.min(i * rows_a_step, run[ROWS]), T.min((i + 1) * rows_a_step, run[ROWS])):
            finish_row(run, acc, bias, extra, out, r)

    @T.inline
    def accumulate(both, height, run, acc, shapes, x, weight, bias, extra, out, row, panel, side):
        upper = T.meta_var(T.int64(amx.ROWS) if both else height)
        lower = T.meta_var(height - amx.ROWS if both else T.int64(0))
        if whole_steps > 0:
            if run[SHAPE] != height:
                amx.configure(shapes, upper, lower, amx.PAIRS)
                run[SHAPE] = height
            clear(both)
            for i in range(whole_steps):
                prefetch(run, weight, panel, i)
                multiply(both, x, weight, row, panel, i)
                finish_some(run, acc, bias, extra, out, i)
            save(both, acc, side)
        else:
            for r in range(run[ROWS]):
                finish_row(run, acc, bias, extra, out, r)
        if rest_pairs > 0:
            amx.configure(shapes, upper, lower, rest_pairs)
            run[SHAPE] = 0
            if whole_steps > 0:
                restore(both, acc, side)
            else:
                clear(both)
            multiply(both, x, weight, row, panel, whole_steps)
            save(both, acc, side)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        weight: T.Buffer((panels, steps, columns), bf16.PAIR),
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
        with T.attr(T.int32(0), "pragma_import_llvm", CPU_LLVM + instructions):
            count: T.let = (t + units - 1) // units
            chunks: T.let = T.min(count * panels, T.int64(_CHUNKS))
            for chunk in T.parallel(chunks):
                with T.sblock("run"):
                    T.reads()
                    T.writes()
                    acc = T.sblock_alloc_buffer((2 * _HEIGHT, columns), "float32")
                    shapes = T.sblock_alloc_buffer((8,), "int64")
                    run = T.sblock_alloc_buffer((_RUN,), "int64")
                    begin: T.let = chunk * (count * panels) // chunks
                    end: T.let = (chunk + 1) * (count * panels) // chunks
                    run[ROWS] = T.int64(0)
                    run[SHAPE] = T.int64(0)
                    for i in range(end - begin):
                        task: T.let = begin + i
                        block: T.let = task // (block_tiles * panels)
                        first: T.let = block * block_tiles
                        in_block: T.let = T.min(count - first, T.int64(block_tiles))
                        panel: T.let = (task - first * panels) // in_block
                        within: T.let = (task - first * panels) % in_block
                        unit: T.let = (first + within) * units
                        height: T.let = T.min(t - unit, T.int64(units)) * rows
                        side: T.let = i % 2 * _HEIGHT
                        run[LINES] = (lines_a_step + in_block - 1) // in_block
                        run[AHEAD] = T.if_then_else(
                            in_block == 1,
                            T.int64(_AHEAD_BYTES // 4),
                            steps * columns + within * whole_steps * run[LINES] * CACHE_LINE_FLOATS,
                        )
                        if height > amx.ROWS:
                            accumulate(
                                True, height, run, acc, shapes, source, weight, bias, residual_rows, result,
                                unit * rows, panel, side,
                            )
                        else:
                            accumulate(
                                False, height, run, acc, shapes, source, weight, bias, residual_rows, result,
                                unit * rows, panel, side,
                            )
                        run[UNIT] = unit
                        run[PANEL] = panel
                        run[ROWS] = height
                        run[SIDE] = side
                    for r in range(run[ROWS]):
                        finish_row(run, acc, bias, residual_rows, result, r)
                    amx.release()
            if normalized:
                normalize_all(result, None, result, gamma, beta)

    absent = [] if residual else ["residual_rows"]
    return without_parameters(kernel, absent if normalized else [*absent, "gamma", "beta"])
