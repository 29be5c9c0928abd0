"""The matrix kernel on the CPU, `norm(activation(x @ W + bias) + residual)` in one call; packing W.

Shapes, all fp32: x `(t, R, k)`, weight `(P, k, C)`, bias `(P * C,)`, residual and out `(t, R, n)`, gamma and
beta `(n,)`. t is symbolic; R = `tiles.row_tile`, C = `tiles.col_tile`, P = `tiles.panels(n)`. A panel is C
columns of W, one row of them per k; the last panel and the bias are padded with zeros.

Strategy
1. A task is one R x C tile of the output: R * C accumulators in registers, rows unrolled, columns
   vectorised, one pass over k, and per k one load of C weights and R broadcasts of x (24 FMAs for 12 x 32 on
   AVX-512).
2. Tasks are numbered row block, panel, tile within the block, and the thread pool hands out contiguous runs
   of numbers: the load is even to one tile, a large batch splits by rows, a small one by panels. In a row
   block of about `_BLOCK_ROWS` rows a panel stays in L2 while the tiles pass over it, and the block's x
   stays there from panel to panel. Splitting whole row blocks was rejected: 11 tiles on 2 threads come out
   as 8 + 3.
3. Each step of k prefetches the weights `_AHEAD_FLOATS` further on. Panels lie one after another, so this
   runs on into the next one. The hardware's prefetchers stop at every 4 KB page: without this a single tile,
   which is bound by memory, reads at two thirds of the speed. The lines to be written are asked for before
   the k loop.
4. Bias, activation and residual apply to the tile in registers. If n is no multiple of C, those columns of
   the last panel that exist are copied one by one.
5. The norm needs whole rows: a second parallel loop normalises `out` in place.

The accumulators are two buffers, because TVM keeps "global" buffers below 1 KB, and no others, on the stack:
a call to the workspace pool costs 50 ns. `T.let`, because a plain assignment in TVMScript makes such a call
as well.

Rejected after measuring (Zen 5): unrolling k by 2 or 4, row blocks of 48 and 192 rows, prefetching x or the
residual (no gain); 6 x 64 (slower where bound by memory); 14 x 32 (1 % faster, but rounds short requests up further).

Method: Goto, van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with W packed
beforehand, and neither k blocked nor x packed: x has so few columns that a block of its rows fits L2.
"""

from __future__ import annotations

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.normalization import normalize_row, row_of
from turbo_tvm.schedules.script import (
    CACHE_LINE_FLOATS,
    PREFETCH_LLVM,
    prefetch_read,
    prefetch_write,
    without_parameters,
)
from turbo_tvm.schedules.tiles import CpuTiles
from turbo_tvm.schedules.vector_math import activation as activation_by_name

_BLOCK_ROWS = 96
_AHEAD_FLOATS = 4096
_PACK_ROWS = 16


def linear(
    tiles: CpuTiles,
    *,
    k: int,
    n: int,
    activation: str | None = None,
    residual: bool = False,
    norm_eps: float | None = None,
    x_width: int | None = None,
    out_width: int | None = None,
) -> tvm.tirx.PrimFunc:
    """`(x, weight, bias, [residual,] [gamma, beta,] out)`; gamma, beta and the norm if `norm_eps` is given.

    x_width, out_width: columns of the buffers that hold x and out, if they are wider than k and n. Not with a norm.
    """
    x_width, out_width = x_width or k, out_width or n
    rows, columns, panels = tiles.row_tile, tiles.col_tile, tiles.panels(n)
    half, block_tiles, lines = rows // 2, max(1, _BLOCK_ROWS // rows), max(1, columns // CACHE_LINE_FLOATS)
    whole_panels, tail_columns, has_tail = n // columns, n % columns, n % columns != 0
    normalized = norm_eps is not None
    activate = activation_by_name(activation)
    normalize = normalize_row(tiles.lanes, n, norm_eps or 0.0)

    def add_residual(value: Expr, buffer: tvm.tirx.Buffer, tile: Expr, row: Expr, column: Expr) -> Expr:
        return value + buffer[tile, row, column] if residual else value

    @T.inline
    def start(acc, bias, panel):
        for r in T.unroll(half):
            for c in T.vectorized(columns):
                acc[r, c] = bias[panel * columns + c]

    @T.inline
    def step(acc, x, weight, tile, first_row, panel, i):
        for r in T.unroll(half):
            for c in T.vectorized(columns):
                acc[r, c] = acc[r, c] + x[tile, first_row + r, i] * weight[panel, i, c]

    @T.inline
    def store(acc, extra, out, tile, first_row, panel):
        for r in T.unroll(half):
            for c in T.vectorized(columns):
                out[tile, first_row + r, panel * columns + c] = add_residual(
                    activate(acc[r, c]), extra, tile, first_row + r, panel * columns + c
                )

    @T.inline
    def store_tail(acc, extra, out, tile, first_row):
        for r in range(half):
            for c in T.vectorized(columns):
                acc[r, c] = activate(acc[r, c])
            for c in range(tail_columns):
                out[tile, first_row + r, whole_panels * columns + c] = add_residual(
                    acc[r, c], extra, tile, first_row + r, whole_panels * columns + c
                )

    @T.inline
    def compute_tile(x, weight, bias, extra, out, tile, panel):
        with T.sblock("tile"):
            T.reads()
            T.writes()
            upper = T.sblock_alloc_buffer((half, columns), "float32")
            lower = T.sblock_alloc_buffer((half, columns), "float32")
            start(upper, bias, panel)
            start(lower, bias, panel)
            for r in T.unroll(rows):
                for line in T.unroll(lines):
                    prefetch_write(out, (tile * rows + r) * out_width + panel * columns + line * CACHE_LINE_FLOATS)
            for i in range(k):
                for line in T.unroll(lines):
                    prefetch_read(weight, (panel * k + i) * columns + line * CACHE_LINE_FLOATS + _AHEAD_FLOATS)
                step(upper, x, weight, tile, 0, panel, i)
                step(lower, x, weight, tile, half, panel, i)
            if has_tail:
                if panel < whole_panels:
                    store(upper, extra, out, tile, 0, panel)
                    store(lower, extra, out, tile, half, panel)
                else:
                    store_tail(upper, extra, out, tile, 0)
                    store_tail(lower, extra, out, tile, half)
            else:
                store(upper, extra, out, tile, 0, panel)
                store(lower, extra, out, tile, half, panel)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        weight: T.Buffer((panels, k, columns), "float32"),
        bias: T.Buffer((panels * columns,), "float32"),
        residual_arg: T.handle,
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        x = T.match_buffer(x_arg, (t, rows, x_width), "float32")
        residual_rows = T.match_buffer(residual_arg, (t, rows, n), "float32")
        out = T.match_buffer(out_arg, (t, rows, out_width), "float32")
        with T.attr(T.int32(0), "pragma_import_llvm", PREFETCH_LLVM):
            for task in T.parallel(t * panels):
                block: T.let = task // (block_tiles * panels)
                tiles_in_block: T.let = T.min(block_tiles, t - block * block_tiles)
                within: T.let = task - block * (block_tiles * panels)
                panel: T.let = within // tiles_in_block
                tile: T.let = block * block_tiles + within - panel * tiles_in_block
                compute_tile(x, weight, bias, residual_rows, out, tile, panel)
        if normalized:
            for task in T.parallel(t * rows):
                row_tile: T.let = task // rows
                row: T.let = task % rows
                normalize(out, row_tile, row, row_of(row_tile, row, out), gamma, beta)

    absent = [] if residual else ["residual_rows"]
    return without_parameters(kernel, absent if normalized else [*absent, "gamma", "beta"])


def pack_weight(tiles: CpuTiles, *, k: int, n: int) -> tvm.tirx.PrimFunc:
    """`(w, packed)`: fp32 `(n, k)`, PyTorch's layout, to `(P, k, C)` with zeros for the columns beyond n.

    One task per panel and `_PACK_ROWS` of its rows: the block is read along the rows of w, a cache line each,
    and the lines that it scatters to all fit L1.
    """
    columns, panels = tiles.col_tile, tiles.panels(n)
    blocks = -(-k // _PACK_ROWS)

    @T.prim_func(private=True, s_tir=True)
    def kernel(w: T.Buffer((n, k), "float32"), packed: T.Buffer((panels, k, columns), "float32")):
        T.func_attr({"tirx.noalias": True})
        for task in T.parallel(panels * blocks):
            panel: T.let = task // blocks
            first: T.let = (task % blocks) * _PACK_ROWS
            for c in range(columns):
                if panel * columns + c < n:
                    for i in range(T.min(_PACK_ROWS, k - first)):
                        packed[panel, first + i, c] = w[panel * columns + c, first + i]
                else:
                    for i in range(T.min(_PACK_ROWS, k - first)):
                        packed[panel, first + i, c] = T.float32(0)

    return kernel


def pack_bias(tiles: CpuTiles, *, n: int) -> tvm.tirx.PrimFunc:
    """`(bias, packed)`: fp32 `(n,)` to `(P * C,)`, padded with zeros."""
    padded = tiles.panels(n) * tiles.col_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(bias: T.Buffer((n,), "float32"), packed: T.Buffer((padded,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in range(n):
            packed[i] = bias[i]
        for i in range(padded - n):
            packed[n + i] = T.float32(0)

    return kernel
