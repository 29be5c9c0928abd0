"""Rotary position embedding of queries and keys on the CPU, on the rows that hold them. fp32 arithmetic.

Layout: activations `(t, R, width)`, fp32 or bf16, R = `tiles.row_tile`, t symbolic; `position_ids`: int32 `(t, R)`;
`table`: fp32 `(positions, dims)`, for each position the cosines of its dims / 2 angles, then the sines.

Strategy
1. A task is a row.
2. The heads of queries and of keys lie side by side in it, so that one loop over heads turns all of them; their first
   halves and second halves are the two coordinates. Both are read before either is written: the rows may be turned in
   place.
3. Columns that are not turned (values) are copied.

Method: Su et al., "RoFormer" (arXiv 2104.09864), in the half-split form of GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Rotary
from turbo_tvm.schedules.common.space import Macro, Variant
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.tiles import CpuTiles

Spans = tuple[tuple[int, int], ...]  # (first column, heads or columns)


def rotary(operator: Rotary, tiles: CpuTiles, _variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(x, position_ids, table, out)`: heads of each span turned by their row's position, the rest as it is.

    The first `dims` columns of a head turn: out[i] = x[i] cos_i - x[i + dims / 2] sin_i, out[i + dims / 2] =
    x[i + dims / 2] cos_i + x[i] sin_i.
    """
    rows, columns, head_dim, spans = tiles.row_tile, operator.columns, operator.head_dim, operator.spans
    dims, positions, x_rows, out_rows = operator.dims, operator.positions, operator.x, operator.out
    half = dims // 2
    pair_width = min(tiles.lanes, half & -half)
    turn_spans = _turn_spans_macro(_turn_macro(half, pair_width), head_dim, spans)
    copy_parts = _copy_parts_macro(tiles.lanes, kept_columns(columns, head_dim, dims, spans))

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, ids_arg: T.handle, table_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, x_rows.width), x_rows.dtype)
        position_ids = T.match_buffer(ids_arg, (t, rows), "int32")
        table = T.match_buffer(table_arg, (positions, dims), "float32")
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        # 1. a task is a row
        for task in T.parallel(t * rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                pair = T.sblock_alloc_buffer((2, pair_width), "float32")  # "global" and small: on the stack
                tile: T.let = task // rows
                row: T.let = task % rows
                position: T.let = T.cast(position_ids[tile, row], "int64")
                at = T.meta_var(_Row(source, result, tile, row))
                # 2. the heads of queries and of keys
                turn_spans(at, _Angles(table, position), pair)
                # 3. the rest
                copy_parts(at)

    return kernel


@dataclass(frozen=True)
class _Row:
    """A row of the input, and where its turned columns go."""

    source: tvm.tirx.Buffer
    result: tvm.tirx.Buffer
    tile: Expr
    row: Expr

    def load(self, column: Expr) -> Expr:
        """Return an element of the row in fp32."""
        return bf16.load(self.source, self.tile, self.row, column)


@dataclass(frozen=True)
class _Angles:
    """The cosines and sines of a position."""

    table: tvm.tirx.Buffer
    position: Expr

    def at(self, column: Expr) -> Expr:
        """Return a cosine, or a sine in the second half."""
        return self.table[self.position, column]


def _turn_macro(half: int, lanes: int) -> Macro:
    """`turn(at, angles, pair, first)`: step 2 for the head whose first column is given.

    pair: fp32 (2, lanes), scratch.
    """

    @T.inline
    def turn(at, angles, pair, first):
        for block in range(half // lanes):
            low = T.meta_var(first + block * lanes)
            angle = T.meta_var(block * lanes)
            # 2. both coordinates are read before either is written
            for lane in T.vectorized(lanes):
                pair[0, lane] = at.load(low + lane)
            for lane in T.vectorized(lanes):
                pair[1, lane] = at.load(low + half + lane)
            for lane in T.vectorized(lanes):
                at.result[at.tile, at.row, low + lane] = bf16.stored(
                    at.result, pair[0, lane] * angles.at(angle + lane) - pair[1, lane] * angles.at(angle + half + lane)
                )
            for lane in T.vectorized(lanes):
                at.result[at.tile, at.row, low + half + lane] = bf16.stored(
                    at.result, pair[1, lane] * angles.at(angle + lane) + pair[0, lane] * angles.at(angle + half + lane)
                )

    return turn


def _turn_spans_macro(turn: Macro, head_dim: int, spans: Spans) -> Macro:
    """`turn_spans(at, angles, pair)`: step 2 for all heads of all spans."""

    @T.inline
    def turn_from(at, angles, pair, span, again):
        for head in range(spans[span][1]):
            turn(at, angles, pair, spans[span][0] + head * head_dim)
        if span + 1 < len(spans):
            again(at, angles, pair, span + 1, again)

    @T.inline
    def turn_spans(at, angles, pair):
        turn_from(at, angles, pair, 0, turn_from)

    return turn_spans


def _copy_parts_macro(lanes: int, kept: Spans) -> Macro:
    """`copy_parts(at)`: step 3 for (first column, columns) of each part."""

    @T.inline
    def copy_from(at, part, again):
        first = T.meta_var(kept[part][0])
        size = T.meta_var(kept[part][1])
        for block in range(size // lanes):
            for lane in T.vectorized(lanes):
                at.result[at.tile, at.row, first + block * lanes + lane] = bf16.stored(
                    at.result, at.load(first + block * lanes + lane)
                )
        for rest in range(size % lanes):
            at.result[at.tile, at.row, first + size // lanes * lanes + rest] = bf16.stored(
                at.result, at.load(first + size // lanes * lanes + rest)
            )
        if part + 1 < len(kept):
            again(at, part + 1, again)

    @T.inline
    def copy_parts(at):
        if len(kept) > 0:
            copy_from(at, 0, copy_from)

    return copy_parts


def kept_columns(columns: int, head_dim: int, dims: int, spans: Spans) -> Spans:
    """Return (first column, columns) of what does not turn."""
    turned = [False] * columns
    for first, heads in spans:
        for head in range(heads):
            start = first + head * head_dim
            turned[start : start + dims] = [True] * dims
    edges = [i for i in range(columns + 1) if (i == 0 or turned[i - 1]) != (i == columns or turned[i])]
    return tuple((first, end - first) for first, end in zip(edges[::2], edges[1::2], strict=True))
