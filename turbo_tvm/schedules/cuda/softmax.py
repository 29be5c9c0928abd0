"""Softmax over rows on a GPU, by the batch reduction (`reduction.py`).

Layout: x and out `(m, 1, width)`, the first n columns of them, fp32, fp16 or bf16; m symbolic. fp32 arithmetic.

A row is read once and written once: it stays in registers between maximum, sum and quotient. A row longer than that
is read twice: the running maximum and the sum that belongs to it come from one sweep. Elements of -inf weigh nothing; a
row of nothing else gives zeros.

Method: the batch reduction of TurboTransformers (PPoPP 2021); the running maximum after Milakov, Gimelshein, "Online
normalizer calculation for softmax" (arXiv 1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda import reduction, strips
from turbo_tvm.schedules.cuda.reduction import RowForm, add, largest
from turbo_tvm.schedules.cuda.script import kernel_attrs
from turbo_tvm.schedules.cuda.strips import Team
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.common.space import Space, Variant

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

_LOG2_E = math.log2(math.e)


def space(*, n: int, x: RowFormat | None = None, out: RowFormat | None = None, **_options: object) -> Space:
    """The decisions of this kernel: how rows are spread over threads."""
    return reduction.row_space(n, reduction.vector_width(n, x or RowFormat(n), out or RowFormat(n)))


def softmax(
    *,
    n: int,
    x: RowFormat | None = None,
    out: RowFormat | None = None,
    form: RowForm | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, out)`: e^x over the row's sum of that. x, out: fp32 and n columns wide unless the formats say else.

    variants: one setting of `space` at most. form: how rows are spread over threads, in the place of variants.
    """
    x_rows, out_rows = x or RowFormat(n), out or RowFormat(n)
    form = form or reduction.chosen_form(n, reduction.vector_width(n, x_rows, out_rows), variants)
    rows, segments = form.rows, form.segments
    load_rows = strips.load_rows_macro(form, x_rows.dtype, neutral=-math.inf)
    each_chunk, store_chunk = strips.each_chunk_macro(form), strips.store_chunk_macro(form, out_rows.dtype)
    reduce_max = reduction.all_reduce_macro(form, largest, rows)
    reduce_sum = reduction.all_reduce_macro(form, add, rows)
    strip_max, strip_sum = (strips.strip_reduce_macro(form, f) for f in (largest, add))

    def at(strip: tvm.tirx.Buffer):
        return lambda row, i: strip[row, i]

    def power(x: Expr, peak: Expr) -> Expr:
        """e^(x - peak), also where both are -inf."""
        return T.exp2((x - T.max(peak, T.float32(-3e38))) * T.float32(_LOG2_E))

    def weight(strip: tvm.tirx.Buffer, peak: tvm.tirx.Buffer):
        return lambda row, i: power(strip[row, i], peak[row])

    def share(strip: tvm.tirx.Buffer, inverse: tvm.tirx.Buffer, chunk: Expr):
        return lambda row, j: strip[row, chunk * form.vector + j] * inverse[row]

    @T.inline
    def rows_of_team(x, out, team, strip, peak, total, before, partials):
        for row in T.unroll(rows):
            peak[row] = T.float32(-math.inf)
            total[row] = T.float32(0)
        for segment in range(segments):
            load_rows(strip, x, team, segment)
            if segments == 1:
                strip_max(peak, at(strip))
            else:
                for row in T.unroll(rows):
                    before[row] = peak[row]
                strip_max(peak, at(strip))
                for row in T.unroll(rows):
                    total[row] = total[row] * power(before[row], peak[row])
                strip_sum(total, weight(strip, peak))
        if segments > 1:
            for row in T.unroll(rows):
                before[row] = peak[row]
        reduce_max(peak, partials, 0, team.thread)
        if segments == 1:
            for row in T.unroll(rows):
                for i in T.unroll(form.strip):
                    strip[row, i] = power(strip[row, i], peak[row])
            strip_sum(total, at(strip))
        else:
            for row in T.unroll(rows):
                total[row] = total[row] * power(before[row], peak[row])
        reduce_sum(total, partials, 1, team.thread)
        for row in T.unroll(rows):
            total[row] = T.if_then_else(total[row] > T.float32(0), T.float32(1) / total[row], T.float32(0))
        for segment in range(segments):
            if segments > 1:
                load_rows(strip, x, team, segment)
                for row in T.unroll(rows):
                    for i in T.unroll(form.strip):
                        strip[row, i] = power(strip[row, i], peak[row])

            @T.inline
            def store(chunk, column):
                store_chunk(out, team, column, share(strip, total, chunk))

            each_chunk(team, segment, store)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr(kernel_attrs(form.rows * form.teams))
        m = T.int32()
        source = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        for block in T.thread_binding(form.blocks(m), thread="blockIdx.x"):
            for y in T.thread_binding(form.teams, thread="threadIdx.y"):
                for thread in T.thread_binding(form.threads, thread="threadIdx.x"):
                    with T.sblock("team"):
                        T.reads()
                        T.writes()
                        strip = T.sblock_alloc_buffer((rows, form.strip), "float32", scope="local")
                        peak = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        before = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        partials = T.sblock_alloc_buffer((2, rows, form.warps), "float32", scope="shared")
                        team = T.meta_var(Team(form, thread, form.first_row(block, y), m))
                        rows_of_team(source, result, team, strip, peak, total, before, partials)

    return kernel
