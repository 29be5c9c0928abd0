"""Strips of rows in registers: how a team's threads load, change, reduce and store their part of each row.

A thread's part of a row comes in chunks, of one access each, a team's width apart; rows too long for registers come in
segments of so many chunks (`RowForm`). Macros take the strip as local fp32 `(X, strip)`, and a `Team`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cuda.numbers import from_float, to_float
from turbo_tvm.schedules.cuda.reduction import ACCESS_BYTES, Combine, RowForm

Element = Callable[[Expr, Expr], Expr]  # a number by row, of the X, and place in the strip or chunk


@dataclass(frozen=True)
class Team:
    """A thread's place in its team, and the team's rows."""

    form: RowForm
    thread: Expr  # its number in the team
    first_row: Expr  # of the team's X rows
    count: Expr  # rows in all

    def column(self, segment: Expr, chunk: Expr) -> Expr:
        """Return the first column of the thread's chunk."""
        return ((segment * self.form.chunks + chunk) * self.form.threads + self.thread) * self.form.vector

    def row(self, index: Expr) -> Expr:
        """Return a row to read: the last one stands for those past the end, whose results are not stored."""
        return T.min(self.first_row + index, self.count - 1)

    def has_row(self, index: Expr) -> Expr:
        """Return whether that row exists, and its result is to be stored."""
        return self.first_row + index < self.count


def load_rows_macro(form: RowForm, dtype: str, neutral: float = 0.0, added: bool = False) -> Macro:
    """Return `load_rows(strip, x, team, segment)`: fill the strip with the thread's elements of its X rows, as fp32.

    strip: local fp32 `(X, strip)`. x: `(rows, 1, width)` of that dtype. neutral: what stands for elements past the row.
    added: add to what is there.
    """
    fill = _fill_macro(form, dtype, neutral, added)

    @T.inline
    def load_rows(strip, x, team, segment):
        for row in T.unroll(form.rows):
            fill(strip, _row_of(x, team.row(row)), team, segment, row)

    return load_rows


def gather_rows_macro(form: RowForm, dtype: str, added: bool = False) -> Macro:
    """Return `gather_rows(strip, table, ids, team, segment)`: `load_rows` from rows of a table, by ids `(rows, 1)`."""
    fill = _fill_macro(form, dtype, 0.0, added)

    @T.inline
    def gather_rows(strip, table, ids, team, segment):
        for row in T.unroll(form.rows):
            fill(strip, _row_of(table, ids[team.row(row), 0]), team, segment, row)

    return gather_rows


def _row_of(x: tvm.tirx.Buffer, row: Expr) -> Callable[[Expr], Expr]:
    """Return column -> element of that row of an `(rows, 1, width)` or `(rows, width)` buffer."""
    return lambda column: x[row, 0, column] if len(x.shape) == 3 else x[row, column]


def _fill_macro(form: RowForm, dtype: str, neutral: float, added: bool) -> Macro:
    """Return `fill(strip, element, team, segment, row)`: fill the strip of one of the X rows from element(column)."""
    vector, whole = form.vector, form.whole_chunks

    @T.inline
    def fill_chunk(strip, element, team, segment, row, chunk):
        with T.sblock("load"):
            T.reads()
            T.writes()
            raw = T.sblock_alloc_buffer((vector,), dtype, scope="local")
            for j in T.vectorized(vector):
                raw[j] = element(team.column(segment, chunk) + j)
            for j in T.unroll(vector):
                if added:
                    strip[row, chunk * vector + j] = strip[row, chunk * vector + j] + to_float(raw[j], dtype)
                else:
                    strip[row, chunk * vector + j] = to_float(raw[j], dtype)

    @T.inline
    def fill(strip, element, team, segment, row):
        for chunk in T.unroll(whole):
            fill_chunk(strip, element, team, segment, row, chunk)
        for chunk in T.unroll(form.chunks - whole):
            if team.column(segment, whole + chunk) < form.n:
                fill_chunk(strip, element, team, segment, row, whole + chunk)
            else:
                if not added:
                    for j in T.unroll(vector):
                        strip[row, (whole + chunk) * vector + j] = T.float32(neutral)

    return fill


def load_columns_macro(form: RowForm, dtype: str) -> Macro:
    """Return `load_columns(local, vector, column)`: load a chunk of a vector of that dtype, which all rows share."""
    width = min(form.vector, ACCESS_BYTES // tvm.DataType(dtype).itemsize)

    @T.inline
    def load_columns(local, vector, column):
        for i in T.unroll(form.vector // width):
            for j in T.vectorized(width):
                local[i * width + j] = vector[column + i * width + j]

    return load_columns


def add_vector_macro(form: RowForm, dtype: str) -> Macro:
    """Return `add_vector(strip, vector, team, segment)`: add a vector of that dtype, which all rows share."""
    load_columns, each_chunk = load_columns_macro(form, dtype), each_chunk_macro(form)

    @T.inline
    def add_vector(strip, vector, team, segment):
        with T.sblock("vector"):
            T.reads()
            T.writes()
            held = T.sblock_alloc_buffer((form.vector,), dtype, scope="local")

            @T.inline
            def add_chunk(chunk, column):
                load_columns(held, vector, column)
                for row in T.unroll(form.rows):
                    for j in T.unroll(form.vector):
                        strip[row, chunk * form.vector + j] = strip[row, chunk * form.vector + j] + to_float(
                            held[j], dtype
                        )

            each_chunk(team, segment, add_chunk)

    return add_vector


def each_chunk_macro(form: RowForm) -> Macro:
    """Return `each_chunk(team, segment, body)`: run body(chunk, column) for the thread's chunks inside the row."""
    whole = form.whole_chunks

    @T.inline
    def each_chunk(team, segment, body):
        for chunk in T.unroll(whole):
            body(chunk, team.column(segment, chunk))
        for chunk in T.unroll(form.chunks - whole):
            if team.column(segment, whole + chunk) < form.n:
                body(whole + chunk, team.column(segment, whole + chunk))

    return each_chunk


def store_chunk_macro(form: RowForm, dtype: str) -> Macro:
    """Return `store_chunk(out, team, column, element)`: store element(row, place in chunk) from that column on."""

    @T.inline
    def store_chunk(out, team, column, element):
        for row in T.unroll(form.rows):
            if team.has_row(row):
                with T.sblock("store"):
                    T.reads()
                    T.writes()
                    raw = T.sblock_alloc_buffer((form.vector,), dtype, scope="local")
                    for j in T.unroll(form.vector):
                        raw[j] = from_float(element(row, j), dtype)
                    for j in T.vectorized(form.vector):
                        out[team.first_row + row, 0, column + j] = raw[j]

    return store_chunk


def strip_reduce_macro(form: RowForm, combine: Combine, first: int = 0) -> Macro:
    """Return `strip_reduce(values, element)`: combine values with element(row, i) of the thread's strip, row by row.

    first: which of the values is that of the first row.
    """

    @T.inline
    def strip_reduce(values, element):
        for row in T.unroll(form.rows):
            for i in T.unroll(form.strip):
                values[first + row] = combine(values[first + row], element(row, i))

    return strip_reduce


def strip_map_macro(form: RowForm) -> Macro:
    """Return `strip_map(strip, team, segment, element)`: set the strip to element(row, i), 0 past the row's end."""
    vector, whole = form.vector, form.whole_chunks

    @T.inline
    def strip_map(strip, team, segment, element):
        for row in T.unroll(form.rows):
            for i in T.unroll(whole * vector):
                strip[row, i] = element(row, i)
            for chunk in T.unroll(form.chunks - whole):
                for j in T.unroll(vector):
                    strip[row, (whole + chunk) * vector + j] = T.Select(
                        team.column(segment, whole + chunk) < form.n,
                        element(row, (whole + chunk) * vector + j),
                        T.float32(0),
                    )

    return strip_map
