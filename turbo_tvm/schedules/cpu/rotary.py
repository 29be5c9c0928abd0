"""Rotary position embedding of queries and keys on the CPU, on the rows that hold them. fp32 arithmetic.

Layout: activations `(t, R, width)`, fp32 or bf16, R = `tiles.row_tile`, t symbolic; `position_ids`: int32 `(t, R)`;
`table`: fp32 `(positions, dims)`, for each position the cosines of its dims / 2 angles, then the sines.

Strategy: a task is a row. The heads of queries and of keys lie side by side in it, so that one loop over heads turns
all of them; their first halves and second halves are the two coordinates. Both are read before either is written: the
rows may be turned in place. Columns that are not turned (values) are copied.

Method: Su et al., "RoFormer" (arXiv 2104.09864), in the half-split form of GPT-NeoX.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.tiles import CpuTiles


def rotary(
    tiles: CpuTiles,
    *,
    columns: int,
    head_dim: int,
    dims: int,
    positions: int,
    spans: tuple[tuple[int, int], ...],
    x: RowFormat | None = None,
    out: RowFormat | None = None,
) -> tvm.tirx.PrimFunc:
    """`(x, position_ids, table, out)`: the heads of each span turned by their row's position, the rest as it is.

    spans: (first column, heads) of each, of at most `columns` columns; the first `dims` columns of a head turn:
    out[i] = x[i] cos_i - x[i + dims / 2] sin_i, out[i + dims / 2] = x[i + dims / 2] cos_i + x[i] sin_i.
    """
    rows = tiles.row_tile
    x_rows, out_rows = x or RowFormat(columns), out or RowFormat(columns)
    half = dims // 2
    lanes = min(tiles.lanes, half & -half)
    kept = kept_columns(columns, head_dim, dims, spans)

    @T.inline
    def turn(source, result, table, pair, tile, row, position, first):
        for block in range(half // lanes):
            low = T.meta_var(first + block * lanes)
            angle = T.meta_var(block * lanes)
            for lane in T.vectorized(lanes):
                pair[0, lane] = bf16.load(source, tile, row, low + lane)
            for lane in T.vectorized(lanes):
                pair[1, lane] = bf16.load(source, tile, row, low + half + lane)
            for lane in T.vectorized(lanes):
                result[tile, row, low + lane] = bf16.stored(
                    result,
                    pair[0, lane] * table[position, angle + lane]
                    - pair[1, lane] * table[position, angle + half + lane],
                )
            for lane in T.vectorized(lanes):
                result[tile, row, low + half + lane] = bf16.stored(
                    result,
                    pair[1, lane] * table[position, angle + lane]
                    + pair[0, lane] * table[position, angle + half + lane],
                )

    @T.inline
    def turn_span(source, result, table, pair, tile, row, position, span, again):
        first = T.meta_var(spans[span][0])
        for head in range(spans[span][1]):
            turn(source, result, table, pair, tile, row, position, first + head * head_dim)
        if span + 1 < len(spans):
            again(source, result, table, pair, tile, row, position, span + 1, again)

    @T.inline
    def copy_span(source, result, tile, row, part, again):
        first = T.meta_var(kept[part][0])
        size = T.meta_var(kept[part][1])
        for block in range(size // tiles.lanes):
            for lane in T.vectorized(tiles.lanes):
                result[tile, row, first + block * tiles.lanes + lane] = bf16.stored(
                    result, bf16.load(source, tile, row, first + block * tiles.lanes + lane)
                )
        for rest in range(size % tiles.lanes):
            result[tile, row, first + size // tiles.lanes * tiles.lanes + rest] = bf16.stored(
                result, bf16.load(source, tile, row, first + size // tiles.lanes * tiles.lanes + rest)
            )
        if part + 1 < len(kept):
            again(source, result, tile, row, part + 1, again)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, ids_arg: T.handle, table_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, x_rows.width), x_rows.dtype)
        position_ids = T.match_buffer(ids_arg, (t, rows), "int32")
        table = T.match_buffer(table_arg, (positions, dims), "float32")
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        for task in T.parallel(t * rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                pair = T.sblock_alloc_buffer((2, lanes), "float32")  # "global" and small: on the stack
                tile: T.let = task // rows
                row: T.let = task % rows
                position: T.let = T.cast(position_ids[tile, row], "int64")
                turn_span(source, result, table, pair, tile, row, position, 0, turn_span)
                if len(kept) > 0:
                    copy_span(source, result, tile, row, 0, copy_span)

    return kernel


def kept_columns(columns: int, head_dim: int, dims: int, spans: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """(first column, columns) of what does not turn."""
    turned = [False] * columns
    for first, heads in spans:
        for head in range(heads):
            start = first + head * head_dim
            turned[start : start + dims] = [True] * dims
    edges = [i for i in range(columns + 1) if (i == 0 or turned[i - 1]) != (i == columns or turned[i])]
    return [(first, end - first) for first, end in zip(edges[::2], edges[1::2], strict=True)]
