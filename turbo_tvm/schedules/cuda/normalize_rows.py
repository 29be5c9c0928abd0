"""The norm of rows that a team of threads holds in registers: layer norm, RMS norm and L2 norm.

Numbered steps in the bodies are those of the strategy in `normalization.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cuda import reduction, strips
from turbo_tvm.schedules.cuda.numbers import to_float
from turbo_tvm.schedules.cuda.reduction import RowForm, add
from turbo_tvm.schedules.cuda.strips import Element


def normalize_macro(form: RowForm, *, eps: float, kind: str, out: Operand, vectors: str) -> Macro:
    """Return `normalize(load, team, gamma, beta, result)`: the norm of a team's rows, of form.n columns.

    load: a macro `load(strip, segment)` that fills the thread's strip, with zeros past the end of the row; it is called
    once if rows fit registers. gamma, beta: not looked at by kinds that have none.
    """
    rows, centred = form.rows, kind == "layer"
    centre, sum_squares = _centre_macro(form), _sum_squares_macro(form, centred)
    factor = _factor_macro(form, eps, kind)
    scale = _scale_macro(form, kind, out.dtype, vectors)

    @T.inline
    def normalize(load, team, gamma, beta, result):
        with T.sblock("normalize"):
            T.reads()
            T.writes()
            strip = T.sblock_alloc_buffer((rows, form.strip), "float32", scope="local")
            mean = T.sblock_alloc_buffer((rows,), "float32", scope="local")
            sums = T.sblock_alloc_buffer((2 * rows,), "float32", scope="local")
            gains = T.sblock_alloc_buffer((form.vector,), vectors, scope="local")
            shifts = T.sblock_alloc_buffer((form.vector,), vectors, scope="local")
            partial_means = T.sblock_alloc_buffer((1, rows, form.warps), "float32", scope="shared")
            partial_sums = T.sblock_alloc_buffer((1, 2 * rows, form.warps), "float32", scope="shared")
            row = T.meta_var(_Rows(strip, mean, sums, gains, shifts))
            if centred:
                centre(load, team, row, partial_means)
            sum_squares(load, team, row, partial_sums)
            factor(sums)
            scale(load, team, row, (gamma, beta), result)

    return normalize


@dataclass(frozen=True)
class _Rows:
    """What a thread holds of its team's X rows."""

    strip: tvm.tirx.Buffer  # local fp32 `(X, strip)`: its elements
    mean: tvm.tirx.Buffer  # local fp32 `(X,)`
    sums: tvm.tirx.Buffer  # local fp32 `(2 X,)`: the drift of each mean, then sums of squares, which become factors
    gains: tvm.tirx.Buffer  # local `(vector,)`: an access to gamma
    shifts: tvm.tirx.Buffer  # local `(vector,)`: an access to beta


def _plain(strip: tvm.tirx.Buffer) -> Element:
    return lambda row, i: strip[row, i]


def _squares(strip: tvm.tirx.Buffer) -> Element:
    return lambda row, i: strip[row, i] * strip[row, i]


def _less(strip: tvm.tirx.Buffer, mean: tvm.tirx.Buffer) -> Element:
    return lambda row, i: strip[row, i] - mean[row]


def _centre_macro(form: RowForm) -> Macro:
    """Return `centre(load, team, held, partials)`: fill the strips and find the means."""
    reduce_mean, strip_sum = reduction.all_reduce_macro(form, add, form.rows), strips.strip_reduce_macro(form, add)

    @T.inline
    def centre(load, team, held, partials):
        # 2. the mean
        for row in T.unroll(form.rows):
            held.mean[row] = T.float32(0)
        for segment in range(form.segments):
            load(held.strip, segment)
            strip_sum(held.mean, _plain(held.strip))
        reduce_mean(held.mean, partials, 0, team.thread)
        for row in T.unroll(form.rows):
            held.mean[row] = held.mean[row] / T.float32(form.n)

    return centre


def _sum_squares_macro(form: RowForm, centred: bool) -> Macro:
    """Return `sum_squares(load, team, held, partials)`: the sums of x - mean, where it is centred, and of squares."""
    rows, segments = form.rows, form.segments
    strip_sum, strip_squares = strips.strip_reduce_macro(form, add), strips.strip_reduce_macro(form, add, rows)
    reduce_sums, strip_map = reduction.all_reduce_macro(form, add, 2 * rows), strips.strip_map_macro(form)

    @T.inline
    def sum_squares(load, team, held, partials):
        # 3. drift and squares, reduced together
        for i in T.unroll(2 * rows):
            held.sums[i] = T.float32(0)
        for segment in range(segments):
            if segments > 1 or not centred:
                load(held.strip, segment)
            if centred:
                strip_map(held.strip, team, segment, _less(held.strip, held.mean))
                strip_sum(held.sums, _plain(held.strip))
            strip_squares(held.sums, _squares(held.strip))
        reduce_sums(held.sums, partials, 0, team.thread)

    return sum_squares


def _factor_macro(form: RowForm, eps: float, kind: str) -> Macro:
    """Return `factor(sums)`: make drifts of the sums of x - mean, and factors of those of squares."""
    n, rows = form.n, form.rows

    def factor_of(square_sum: Expr, drift: Expr) -> Expr:
        if kind == "l2":
            return T.float32(1) / T.max(T.sqrt(square_sum), T.float32(eps))
        variance = T.max(square_sum / T.float32(n) - drift * drift, T.float32(0))
        return T.float32(1) / T.sqrt(variance + T.float32(eps))

    @T.inline
    def factor(sums):
        for row in T.unroll(rows):
            sums[row] = sums[row] / T.float32(n)
            sums[rows + row] = factor_of(sums[rows + row], sums[row])

    return factor


def _scale_macro(form: RowForm, kind: str, dtype: str, vectors: str) -> Macro:
    """Return `scale(load, team, held, gains, result)`: scale, shift and store the strips. gains: (gamma, beta)."""
    segments, centred = form.segments, kind == "layer"
    load_columns, each_chunk = strips.load_columns_macro(form, vectors), strips.each_chunk_macro(form)
    store_chunk, strip_map = strips.store_chunk_macro(form, dtype), strips.strip_map_macro(form)

    def scaled(held: _Rows, chunk: Expr) -> Element:
        """Return the result at (row, position in chunk)."""

        def element(row: Expr, j: Expr) -> Expr:
            value, factor = held.strip[row, chunk * form.vector + j], held.sums[form.rows + row]
            if kind == "l2":
                return value * factor
            if kind == "rms":
                return value * factor * to_float(held.gains[j], vectors)
            value = (value - held.sums[row]) * factor
            return value * to_float(held.gains[j], vectors) + to_float(held.shifts[j], vectors)

        return element

    @T.inline
    def scale(load, team, held, gains, result):
        for segment in range(segments):
            if segments > 1:
                load(held.strip, segment)
                if centred:
                    strip_map(held.strip, team, segment, _less(held.strip, held.mean))

            @T.inline
            def store(chunk, column):
                # 4. times the factor, gamma and beta
                if kind != "l2":
                    load_columns(held.gains, gains[0], column)
                if centred:
                    load_columns(held.shifts, gains[1], column)
                store_chunk(result, team, column, scaled(held, chunk))

            each_chunk(team, segment, store)

    return scale
