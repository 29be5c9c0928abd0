"""Rotary position embedding on a GPU: `schedules/rotary.py`, a block per row.

A thread takes an access of a head's first half and the same of its second half, reads both and writes both: the rows
may be turned in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.numbers import from_float, to_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting
from turbo_tvm.schedules.cpu.rotary import kept_columns
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.common.space import Knob, Space, Variant

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(**_options: object) -> Space:
    """The decision of this kernel."""
    return Space((Knob("threads", (32, 64, 128, 256), 128, "threads of a block"),))


def rotary(
    *,
    columns: int,
    head_dim: int,
    dims: int,
    positions: int,
    spans: tuple[tuple[int, int], ...],
    x: RowFormat | None = None,
    out: RowFormat | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, position_ids, table, out)`, as `rotary.rotary`; rows `(m, 1, width)`, position_ids int32 `(m, 1)`.

    variants: one setting of `space` at most.
    """
    threads = only_setting(variants, space())["threads"]
    x_rows, out_rows = x or RowFormat(columns), out or RowFormat(columns)
    half = dims // 2
    kept = kept_columns(columns, head_dim, dims, spans)
    vector = vector_width(half, x_rows, out_rows)
    while any(c % vector for c in (head_dim, *(first for first, _ in spans), *sum(kept, ()))):
        vector //= 2
    per_head = half // vector

    @T.inline
    def load(held, source, row, column, part):
        with T.sblock("load"):
            T.reads()
            T.writes()
            raw = T.sblock_alloc_buffer((vector,), x_rows.dtype, scope="local")
            for j in T.vectorized(vector):
                raw[j] = source[row, 0, column + j]
            for j in T.unroll(vector):
                held[part, j] = to_float(raw[j], x_rows.dtype)

    @T.inline
    def store(result, row, column, element):
        with T.sblock("store"):
            T.reads()
            T.writes()
            raw = T.sblock_alloc_buffer((vector,), out_rows.dtype, scope="local")
            for j in T.unroll(vector):
                raw[j] = from_float(element(j), out_rows.dtype)
            for j in T.vectorized(vector):
                result[row, 0, column + j] = raw[j]

    def turned(held, table, position, angle, part):
        """One coordinate of each of the pairs."""
        sign = T.float32(1 if part else -1)
        return lambda j: (
            held[part, j] * table[position, angle + j] + sign * held[1 - part, j] * table[position, angle + half + j]
        )

    def same(held):
        return lambda j: held[0, j]

    @T.inline
    def turn(source, result, table, held, row, position, column, angle):
        load(held, source, row, column, 0)
        load(held, source, row, column + half, 1)
        store(result, row, column, turned(held, table, position, angle, 0))
        store(result, row, column + half, turned(held, table, position, angle, 1))

    @T.inline
    def turn_span(source, result, table, held, row, thread, position, span, again):
        pieces = T.meta_var(spans[span][1] * per_head)
        for i in range((pieces + threads - 1) // threads):
            piece = T.meta_var(i * threads + thread)
            if piece < pieces:
                turn(
                    source,
                    result,
                    table,
                    held,
                    row,
                    position,
                    spans[span][0] + piece // per_head * head_dim + piece % per_head * vector,
                    piece % per_head * vector,
                )
        if span + 1 < len(spans):
            again(source, result, table, held, row, thread, position, span + 1, again)

    @T.inline
    def copy_part(source, result, held, row, thread, part, again):
        pieces = T.meta_var(kept[part][1] // vector)
        for i in range((pieces + threads - 1) // threads):
            piece = T.meta_var(i * threads + thread)
            if piece < pieces:
                load(held, source, row, kept[part][0] + piece * vector, 0)
                store(result, row, kept[part][0] + piece * vector, same(held))
        if part + 1 < len(kept):
            again(source, result, held, row, thread, part + 1, again)

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
                    held = T.sblock_alloc_buffer((2, vector), "float32", scope="local")
                    position: T.let = position_ids[row, 0]
                    turn_span(source, result, table, held, row, thread, position, 0, turn_span)
                    if len(kept) > 0:
                        copy_part(source, result, held, row, thread, 0, copy_part)

    return kernel
