"""Pooling on the CPU: one row per sequence of a packed ragged batch, its first row or the mean of its rows.

Layout: x `(t, R, hidden)` or wider, fp32 or bf16, out fp32 `(bt, R, hidden)` with bt = ceil(b / R), R =
`tiles.row_tile`; t, b and bt symbolic. Row r of either is [r // R, r % R]. `cu_seqlens`: int32 `(b + 1,)`. Surplus rows
of out become zero. Any hidden.

Strategy
1. One parallel task per pooled row.
2. The mean adds the rows of its sequence into the output row in whole vectors, some rows per sweep (knob `rows`), and
   scales it last: x streams through once, in the order of its addresses, while the output row stays in L1. Walking
   down the rows one column block at a time (sums in registers) was rejected: it touches a new page every row or two.

Method: pooling by cu_seqlens instead of a mask, after ByteTransformer (arXiv 2210.03052).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Pool
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.script import tree_sum
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

MODES = ("first", "mean")


def space(operator: Pool, _tiles: CpuTiles) -> Space:
    """Return the decision of this kernel: wide sweeps touch the output less often, narrow ones leave fewer rows."""
    knob = Knob("rows", (2, 4, 8), 4, "rows that a sweep adds to the output")
    return Space((knob,) if operator.mode == "mean" else ())


def _for_each_column(lanes: int, hidden: int) -> Macro:
    """`assign(out, row, value)`: out[row, c] = value(c) for every column c."""
    whole = hidden // lanes * lanes

    @T.inline
    def assign(out, row, value):
        for block in range(hidden // lanes):
            for lane in T.vectorized(lanes):
                out[row // out.shape[1], row % out.shape[1], block * lanes + lane] = value(block * lanes + lane)
        for rest in range(hidden - whole):
            out[row // out.shape[1], row % out.shape[1], whole + rest] = value(whole + rest)

    return assign


def _sum_of_rows(buffer: tvm.tirx.Buffer, rows: list[Expr]) -> Callable[[Expr], Expr]:
    """Return column -> the sum of some rows of a buffer."""
    tile = buffer.shape[1]
    return lambda column: tree_sum([bf16.load(buffer, row // tile, row % tile, column) for row in rows])


def _added(buffer: tvm.tirx.Buffer, row: Expr, value: Callable[[Expr], Expr]) -> Callable[[Expr], Expr]:
    """Return column -> the value, added to a row of a buffer."""
    current = _sum_of_rows(buffer, [row])
    return lambda column: current(column) + value(column)


def _scaled(value: Callable[[Expr], Expr], factor: Expr) -> Callable[[Expr], Expr]:
    """Return column -> the value times a factor."""
    return lambda column: value(column) * factor


def _zero(column: Expr) -> Expr:
    """Return 0 for every column."""
    return T.float32(0)


def pool(operator: Pool, tiles: CpuTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(x, cu_seqlens, out)`: out row i = a row of sequence i, or the mean of its rows.

    x: `(t, R, width)`. cu_seqlens: int32 `(b + 1,)`, ascending from 0: every sequence has a row. Where a token is
    pooled, any rows of x stand in the place of the first ones. A row that is not the first one must exist in every
    sequence. out: fp32 `(bt, R, columns)`; its rows from b on become zero. variants: settings of `space` by rows of x.
    """
    if operator.mode not in MODES:
        raise ValueError(f"unknown pooling mode {operator.mode!r}: use one of {', '.join(MODES)}")
    row_tile, hidden, x_rows = tiles.row_tile, operator.columns_out, operator.x
    mode, row, choices = operator.mode, operator.row, space(operator, tiles)
    run = by_rows(variants, choices, row_tile, lambda setting: _pool_macro(tiles, hidden, mode, row, setting))

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, cu_seqlens_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        bounds = T.int64()
        bt = T.int64()
        source = T.match_buffer(x_arg, (t, row_tile, x_rows.width), x_rows.dtype)
        cu_seqlens = T.match_buffer(cu_seqlens_arg, (bounds,), "int32")
        out = T.match_buffer(out_arg, (bt, row_tile, hidden), "float32")
        operands = T.meta_var((source, cu_seqlens, out))
        run(t, operands)

    return kernel


def _pool_macro(tiles: CpuTiles, hidden: int, mode: str, row: int, setting: dict[str, int]) -> Macro:
    """`run(t, operands)`: every row of the output; operands: (x, cu_seqlens, out)."""
    assign, at_once = _for_each_column(tiles.lanes, hidden), setting.get("rows", 1)

    @T.inline
    def mean(x, out, row, begin, length):
        # 2. add the rows of the sequence, some per sweep, then those left over one by one
        assign(out, row, _zero)
        for group in range(length // at_once):
            first: T.let = begin + group * at_once
            assign(out, row, _added(out, row, _sum_of_rows(x, [first + i for i in range(at_once)])))
        for i in range(length % at_once):
            last: T.let = begin + length - 1 - i
            assign(out, row, _added(out, row, _sum_of_rows(x, [last])))
        # 2. scale last
        assign(out, row, _scaled(_sum_of_rows(out, [row]), T.float32(1) / T.cast(length, "float32")))

    @T.inline
    def pool_rows(source, cu_seqlens, out):
        # 1. a task per pooled row
        for i in T.parallel(out.shape[0] * out.shape[1]):
            with T.sblock("row"):
                T.reads()
                T.writes()
                if i < cu_seqlens.shape[0] - 1:
                    begin: T.let = T.cast(cu_seqlens[i], "int64")
                    length: T.let = T.cast(cu_seqlens[i + 1], "int64") - begin
                    if mode == "mean":
                        mean(source, out, i, begin, length)
                    else:
                        assign(out, i, _sum_of_rows(source, [begin + row]))
                else:
                    assign(out, i, _zero)

    @T.inline
    def run(t, operands):
        pool_rows(*operands)

    return run
