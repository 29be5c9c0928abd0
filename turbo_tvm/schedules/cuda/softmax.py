"""Softmax over rows on a GPU, by the batch reduction (`reduction.py`).

Layout: x and out `(m, 1, width)`, the first n columns of them, fp32, fp16 or bf16; m symbolic. fp32 arithmetic.

Strategy
1. A row is read once and stays in registers between maximum, sum and quotient. A row longer than that is read twice:
   the running maximum, and the sum that belongs to it, come from one sweep.
2. One reduction for the maximum.
3. One for the sum of powers e^(x - maximum); a thread that summed under a maximum of its own scales its sum first.
4. The powers over the sum are rounded and stored.

Elements of -inf weigh nothing; a row of nothing else gives zeros.

Method: the batch reduction of TurboTransformers (PPoPP 2021); the running maximum after Milakov, Gimelshein, "Online
normalizer calculation for softmax" (arXiv 1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Softmax
from turbo_tvm.schedules.common.space import Macro, Space, Variant
from turbo_tvm.schedules.cuda import reduction, strips
from turbo_tvm.schedules.cuda.reduction import RowForm, add, largest
from turbo_tvm.schedules.cuda.script import kernel_attrs
from turbo_tvm.schedules.cuda.strips import Element, Team
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

_LOG2_E = math.log2(math.e)


def space(operator: Softmax, _tiles: CudaTiles) -> Space:
    """Return the decisions of this kernel: how rows are spread over threads."""
    n = operator.columns_out
    return reduction.row_space(n, reduction.vector_width(n, operator.x, operator.out))


def softmax(
    operator: Softmax, _tiles: CudaTiles, variants: Sequence[Variant] = (), form: RowForm | None = None
) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, out)`: e^x over the row's sum of that.

    variants: one setting of `space` at most. form: how rows are spread over threads, in the place of variants.
    """
    n, x_rows, out_rows = operator.columns_out, operator.x, operator.out
    form = form or reduction.chosen_form(n, reduction.vector_width(n, x_rows, out_rows), variants)
    rows, run = form.rows, _softmax_macro(form, x_rows.dtype, out_rows.dtype)

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
                        held = T.meta_var(_Rows(strip, peak, total, before))
                        run(source, result, team, held, partials)

    return kernel


@dataclass(frozen=True)
class _Rows:
    """What a thread holds of its team's X rows, local fp32."""

    strip: tvm.tirx.Buffer  # `(X, strip)`: its elements, later their powers
    peak: tvm.tirx.Buffer  # `(X,)`: the largest element so far
    total: tvm.tirx.Buffer  # `(X,)`: the sum of powers, later what to multiply them with
    before: tvm.tirx.Buffer  # `(X,)`: the largest element of the segments before


def _power(x: Expr, peak: Expr) -> Expr:
    """Return e^(x - peak), also where both are -inf."""
    return T.exp2((x - T.max(peak, T.float32(-3e38))) * T.float32(_LOG2_E))


def _at(strip: tvm.tirx.Buffer) -> Element:
    return lambda row, i: strip[row, i]


def _weight(strip: tvm.tirx.Buffer, peak: tvm.tirx.Buffer) -> Element:
    return lambda row, i: _power(strip[row, i], peak[row])


def _softmax_macro(form: RowForm, x: str, out: str) -> Macro:
    """Return `run(x, out, team, held, partials)`: the softmax of a team's rows. x, out: their dtypes."""
    rows = form.rows
    sweep = _sweep_macro(form, x)
    finish_sum, store = _finish_sum_macro(form), _store_macro(form, x, out)
    reduce_max = reduction.all_reduce_macro(form, largest, rows)
    reduce_sum = reduction.all_reduce_macro(form, add, rows)

    @T.inline
    def run(x, out, team, held, partials):
        sweep(x, team, held)
        # 2. the maximum
        reduce_max(held.peak, partials, 0, team.thread)
        finish_sum(held)
        # 3. the sum
        reduce_sum(held.total, partials, 1, team.thread)
        for row in T.unroll(rows):
            held.total[row] = T.if_then_else(
                held.total[row] > T.float32(0), T.float32(1) / held.total[row], T.float32(0)
            )
        store(x, out, team, held)

    return run


def _sweep_macro(form: RowForm, x: str) -> Macro:
    """Return `sweep(x, team, held)`: the thread's maximum, and where rows come in segments, its sum, from one sweep."""
    rows, segments = form.rows, form.segments
    load_rows = strips.load_rows_macro(form, x, neutral=-math.inf)
    strip_max, strip_sum = (strips.strip_reduce_macro(form, f) for f in (largest, add))

    @T.inline
    def sweep(x, team, held):
        for row in T.unroll(rows):
            held.peak[row] = T.float32(-math.inf)
            held.total[row] = T.float32(0)
        # 1. the row to registers
        for segment in range(segments):
            load_rows(held.strip, x, team, segment)
            if segments == 1:
                strip_max(held.peak, _at(held.strip))
            else:
                for row in T.unroll(rows):
                    held.before[row] = held.peak[row]
                strip_max(held.peak, _at(held.strip))
                for row in T.unroll(rows):
                    held.total[row] = held.total[row] * _power(held.before[row], held.peak[row])
                strip_sum(held.total, _weight(held.strip, held.peak))
        if segments > 1:
            for row in T.unroll(rows):
                held.before[row] = held.peak[row]

    return sweep


def _finish_sum_macro(form: RowForm) -> Macro:
    """Return `finish_sum(held)`: the thread's sum of powers under the maximum of the row."""
    rows, segments, strip_sum = form.rows, form.segments, strips.strip_reduce_macro(form, add)

    @T.inline
    def finish_sum(held):
        # 3. powers, or the sum scaled to the row's maximum
        if segments == 1:
            for row in T.unroll(rows):
                for i in T.unroll(form.strip):
                    held.strip[row, i] = _power(held.strip[row, i], held.peak[row])
            strip_sum(held.total, _at(held.strip))
        else:
            for row in T.unroll(rows):
                held.total[row] = held.total[row] * _power(held.before[row], held.peak[row])

    return finish_sum


def _store_macro(form: RowForm, x: str, out: str) -> Macro:
    """Return `store(x, out, team, held)`: the quotients of the strips; rows in segments are read again."""
    rows, segments = form.rows, form.segments
    load_rows = strips.load_rows_macro(form, x, neutral=-math.inf)
    each_chunk, store_chunk = strips.each_chunk_macro(form), strips.store_chunk_macro(form, out)

    def share(held: _Rows, chunk: Expr) -> Element:
        return lambda row, j: held.strip[row, chunk * form.vector + j] * held.total[row]

    @T.inline
    def store(x, out, team, held):
        # 4. powers over the sum
        for segment in range(segments):
            if segments > 1:
                load_rows(held.strip, x, team, segment)
                for row in T.unroll(rows):
                    for i in T.unroll(form.strip):
                        held.strip[row, i] = _power(held.strip[row, i], held.peak[row])

            @T.inline
            def store_share(chunk, column):
                store_chunk(out, team, column, share(held, chunk))

            each_chunk(team, segment, store_share)

    return store
