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
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.linear_tasks import IN_BLOCK, MISSING, PANEL, PLACES, UNIT, locate_macro, next_row
from turbo_tvm.schedules.cpu.normalization import normalize_all_macro
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.script import CACHE_LINE_FLOATS, CPU_LLVM, prefetch_near, prefetch_read, without_parameters
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cpu.vector_math import activation as activation_by_name

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


@dataclass(frozen=True)
class Product:
    """What is computed: k, n and the epilogue, and how rows are stored."""

    k: int
    n: int
    activation: str | None
    residual: bool
    x: RowFormat
    extra: RowFormat
    out: RowFormat

    @property
    def in_bf16(self) -> bool:
        """Whether it is a product of bf16 numbers."""
        return self.x.dtype == bf16.STORAGE

    @property
    def steps(self) -> int:
        """Rows of a panel."""
        return self.k // 2 if self.in_bf16 else self.k


@dataclass(frozen=True)
class Operands:
    """The buffers of a call; `extra` is the residual."""

    x: tvm.tirx.Buffer
    weight: tvm.tirx.Buffer
    bias: tvm.tirx.Buffer
    extra: tvm.tirx.Buffer
    out: tvm.tirx.Buffer


def space(tiles: CpuTiles, **_options: object) -> Space:
    """The decisions of this kernel."""
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
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, weight, bias, [residual,] [gamma, beta,] out)`; gamma, beta and the norm if `norm_eps` is given.

    x, extra, out: how x, the residual and out are stored, by default fp32 and k, n and n columns wide. x in bf16 makes
    it a product of bf16 numbers; k and the width of x are then even. variants: settings of `space` by rows.
    """
    product = Product(k, n, activation, residual, x or RowFormat(k), extra or RowFormat(n), out or RowFormat(n))
    multiply = by_rows(variants, space(tiles), tiles.row_tile, lambda setting: _multiply_macro(tiles, product, setting))
    return product_kernel(tiles, product, norm_eps, multiply, CPU_LLVM + (bf16.DOT_LLVM if product.in_bf16 else ""))


def product_kernel(
    tiles: CpuTiles, product: Product, norm_eps: float | None, multiply: Macro, llvm: str
) -> tvm.tirx.PrimFunc:
    """The kernel around `multiply(t, operands)`, whatever instructions that uses; llvm: LLVM IR of what it calls."""
    n, rows, columns, panels = product.n, tiles.row_tile, tiles.col_tile, tiles.panels(product.n)
    normalized = norm_eps is not None
    normalize_all = normalize_all_macro(tiles.lanes, n, norm_eps or 0.0)
    weight_type = bf16.PAIR if product.in_bf16 else "float32"

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        weight: T.Buffer((panels, product.steps, columns), weight_type),
        bias: T.Buffer((panels * columns,), "float32"),
        residual_arg: T.handle,
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, product.x.width), product.x.dtype)
        residual_rows = T.match_buffer(residual_arg, (t, rows, product.extra.width), product.extra.dtype)
        result = T.match_buffer(out_arg, (t, rows, product.out.width), product.out.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", llvm):
            operands = T.meta_var(Operands(source, weight, bias, residual_rows, result))
            multiply(t, operands)
            if normalized:
                normalize_all(result, None, result, gamma, beta)

    absent = [] if product.residual else ["residual_rows"]
    return without_parameters(kernel, absent if normalized else [*absent, "gamma", "beta"])


def _multiply_macro(tiles: CpuTiles, product: Product, setting: dict[str, int]) -> Macro:
    """`multiply(t, operands)`: steps 1 to 4 of the strategy for a batch of t row tiles."""
    n, residual, steps = product.n, product.residual, product.steps
    group_steps, near, touch_rows = setting["group"], setting["near"], bool(setting["touch_rows"])
    rows, columns, panels, units = tiles.row_tile, tiles.col_tile, tiles.panels(n), setting["tile_units"]
    block_tiles = max(1, setting["block_rows"] // (rows * units))
    lines = max(1, columns // CACHE_LINE_FLOATS)
    whole_panels, tail_columns, has_tail = n // columns, n % columns, n % columns != 0
    activate = activation_by_name(product.activation, product.out.dtype)
    locate = locate_macro(units, panels, steps, columns, group_steps, setting["ahead"])
    step = _bf16_step(tiles) if product.in_bf16 else _fp32_step(tiles)

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
    def compute_tile(height, place, operands):
        with T.sblock("tile"):
            T.reads()
            T.writes()
            x = T.meta_var(operands.x)
            weight = T.meta_var(operands.weight)
            bias = T.meta_var(operands.bias)
            extra = T.meta_var(operands.extra)
            out = T.meta_var(operands.out)
            unit = T.meta_var(place[UNIT])
            panel = T.meta_var(place[PANEL])
            upper = T.sblock_alloc_buffer((height // 2, columns), "float32")
            lower = T.sblock_alloc_buffer((height // 2, columns), "float32")
            start(upper, bias, panel)
            start(lower, bias, panel)
            for group in range(steps // group_steps):
                for line in T.unroll(lines):
                    prefetch_read(weight, next_row(place, group) * columns + line * CACHE_LINE_FLOATS)
                if place[IN_BLOCK] < group_steps:  # fewer tiles than steps: a row for each step
                    for line in T.unroll((group_steps - 1) * lines):
                        prefetch_read(weight, (next_row(place, group) + 1) * columns + line * CACHE_LINE_FLOATS)
                if residual and touch_rows:
                    prefetch_rows(extra, product.extra, height, unit, panel, group)
                if touch_rows:
                    prefetch_rows(out, product.out, height, unit, panel, group)
                for i in T.unroll(group_steps):
                    if near > 0:
                        for line in T.unroll(lines):
                            prefetch_near(
                                weight,
                                (panel * steps + group * group_steps + i + near) * columns + line * CACHE_LINE_FLOATS,
                            )
                    step(upper, x, weight, unit, 0, panel, group * group_steps + i)
                    step(lower, x, weight, unit, height // 2, panel, group * group_steps + i)
            for i in range(steps % group_steps):
                step(upper, x, weight, unit, 0, panel, steps // group_steps * group_steps + i)
                step(lower, x, weight, unit, height // 2, panel, steps // group_steps * group_steps + i)
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
        count: T.let = (t + units - 1) // units
        blocks: T.let = (count + block_tiles - 1) // block_tiles
        for task in T.parallel(count * panels):
            with T.sblock("task"):
                T.reads()
                T.writes()
                place = T.sblock_alloc_buffer((PLACES,), "int64")
                locate(place, task, t, count, blocks)
                compute(units, compute, place, operands)

    return multiply


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
