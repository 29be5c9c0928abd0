"""Rotary position embedding on a GPU: what `schedules/cpu/rotary.py` describes, a block per row.

Layout: x and out `(m, 1, width)`, fp32, fp16 or bf16; position_ids int32 `(m, 1)`; table fp32 `(positions, dims)`, the
cosines of a position and, behind them, its sines; m symbolic. fp32 arithmetic.

Strategy
1. A thread takes an access of a head's first half and the same of its second half, reads both and writes both: the rows
   may be turned in place.
2. Columns that no head turns are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Rotary
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant
from turbo_tvm.schedules.cpu.rotary import kept_columns
from turbo_tvm.schedules.cuda.numbers import from_float, to_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

Element = Callable[[Expr], Expr]  # a number by its place in an access


def space(_operator: Rotary, _tiles: CudaTiles) -> Space:
    """Return the decision of this kernel."""
    return Space((Knob("threads", (32, 64, 128, 256), 128, "threads of a block"),))


def rotary(operator: Rotary, tiles: CudaTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, position_ids, table, out)`, as `cpu/rotary.py` describes it.

    variants: one setting of `space` at most.
    """
    threads = only_setting(variants, space(operator, tiles))["threads"]
    columns, head_dim, spans, dims = operator.columns, operator.head_dim, operator.spans, operator.dims
    positions, x_rows, out_rows = operator.positions, operator.x, operator.out
    kept = tuple(kept_columns(columns, head_dim, dims, spans))
    turn = _Turn(x_rows, out_rows, head_dim, dims // 2, spans, kept, threads)
    turn_span, copy_part = _turn_span_macro(turn), _copy_part_macro(turn)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, ids_arg: T.handle, table_arg: T.handle, out_arg: T.handle):
        T.func_attr(kernel_attrs(1))
        m = T.int32()
        source = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        position_ids = T.match_buffer(ids_arg, (m, 1), "int32")
        table = T.match_buffer(table_arg, (positions, dims), "float32")
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("row"):
                    T.reads()
                    T.writes()
                    held = T.sblock_alloc_buffer((2, turn.vector), "float32", scope="local")
                    position: T.let = position_ids[row, 0]
                    place = T.meta_var(_Row(source, result, row, thread, held))
                    turn_span(place, table, position, 0, turn_span)
                    if len(turn.kept) > 0:
                        copy_part(place, 0, copy_part)

    return kernel


@dataclass(frozen=True)
class _Turn:
    """Which columns of a row turn, and by how many threads."""

    x: Operand
    out: Operand
    head_dim: int
    half: int  # of the columns of a head that turn
    spans: tuple[tuple[int, int], ...]  # (first column, heads) of each run of heads
    kept: tuple[tuple[int, int], ...]  # (first column, how many) of those that do not turn
    threads: int

    @property
    def vector(self) -> int:
        """Return the elements per access, of which all parts are whole ones."""
        vector = vector_width(self.half, self.x, self.out)
        while any(c % vector for c in (self.head_dim, *(first for first, _ in self.spans), *sum(self.kept, ()))):
            vector //= 2
        return vector


@dataclass(frozen=True)
class _Row:
    """The row of a block, and what a thread of it holds."""

    source: tvm.tirx.Buffer
    result: tvm.tirx.Buffer
    row: Expr
    thread: Expr
    held: tvm.tirx.Buffer  # local fp32 `(2, vector)`: an access to each half


def _load_macro(turn: _Turn) -> Macro:
    """Return `load(place, column, part)`: read an access from that column on."""
    vector, dtype = turn.vector, turn.x.dtype

    @T.inline
    def load(place, column, part):
        with T.sblock("load"):
            T.reads()
            T.writes()
            raw = T.sblock_alloc_buffer((vector,), dtype, scope="local")
            for j in T.vectorized(vector):
                raw[j] = place.source[place.row, 0, column + j]
            for j in T.unroll(vector):
                place.held[part, j] = to_float(raw[j], dtype)

    return load


def _store_macro(turn: _Turn) -> Macro:
    """Return `store(place, column, element)`: write element(j) from that column on."""
    vector, dtype = turn.vector, turn.out.dtype

    @T.inline
    def store(place, column, element):
        with T.sblock("store"):
            T.reads()
            T.writes()
            raw = T.sblock_alloc_buffer((vector,), dtype, scope="local")
            for j in T.unroll(vector):
                raw[j] = from_float(element(j), dtype)
            for j in T.vectorized(vector):
                place.result[place.row, 0, column + j] = raw[j]

    return store


def _turn_macro(turn: _Turn) -> Macro:
    """Return `turn_pairs(place, table, position, column, angle)`: turn an access of pairs of columns.

    column: the first one of the first half. angle: the column of its cosine in the table.
    """
    load, store, half = _load_macro(turn), _store_macro(turn), turn.half

    def turned(held: tvm.tirx.Buffer, table: tvm.tirx.Buffer, position: Expr, angle: Expr, part: int) -> Element:
        """Return one coordinate of each of the pairs."""
        sign = T.float32(1 if part else -1)
        return lambda j: (
            held[part, j] * table[position, angle + j] + sign * held[1 - part, j] * table[position, angle + half + j]
        )

    @T.inline
    def turn_pairs(place, table, position, column, angle):
        # 1. both halves read, both written
        load(place, column, 0)
        load(place, column + half, 1)
        store(place, column, turned(place.held, table, position, angle, 0))
        store(place, column + half, turned(place.held, table, position, angle, 1))

    return turn_pairs


def _turn_span_macro(turn: _Turn) -> Macro:
    """Return `turn_span(place, table, position, span, again)`: turn the heads of that span and of those after it.

    again: the macro itself.
    """
    turn_pairs, spans, threads = _turn_macro(turn), turn.spans, turn.threads
    vector, per_head = turn.vector, turn.half // turn.vector

    @T.inline
    def turn_span(place, table, position, span, again):
        pieces = T.meta_var(spans[span][1] * per_head)
        for i in range((pieces + threads - 1) // threads):
            piece = T.meta_var(i * threads + place.thread)
            if piece < pieces:
                turn_pairs(
                    place,
                    table,
                    position,
                    spans[span][0] + piece // per_head * turn.head_dim + piece % per_head * vector,
                    piece % per_head * vector,
                )
        if span + 1 < len(spans):
            again(place, table, position, span + 1, again)

    return turn_span


def _copy_part_macro(turn: _Turn) -> Macro:
    """Return `copy_part(place, part, again)`: copy that part of what does not turn, and those after it.

    again: the macro itself.
    """
    load, store, kept = _load_macro(turn), _store_macro(turn), turn.kept
    threads, vector = turn.threads, turn.vector

    def same(held: tvm.tirx.Buffer) -> Element:
        return lambda j: held[0, j]

    @T.inline
    def copy_part(place, part, again):
        # 2. columns that no head turns
        pieces = T.meta_var(kept[part][1] // vector)
        for i in range((pieces + threads - 1) // threads):
            piece = T.meta_var(i * threads + place.thread)
            if piece < pieces:
                load(place, kept[part][0] + piece * vector, 0)
                store(place, kept[part][0] + piece * vector, same(place.held))
        if part + 1 < len(kept):
            again(place, part + 1, again)

    return copy_part
