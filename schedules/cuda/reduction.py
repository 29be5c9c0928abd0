"""The batch reduction on a GPU: reductions over rows, by a warp or a block for several rows at a time.

A team of threads, part of a warp, a warp or a block, reduces X rows together. Every thread takes a strip of each row
with 128-bit accesses, reduces it in registers, and the team combines its threads' values:

1. In a warp by xor shuffles at distances 16 ... 1, X independent ones before the X additions that wait for them; the
   result is then in every lane, and a warp needs no barrier at all.
2. In a block, each warp leaves X values in shared memory. One barrier serves all X rows, and every warp reduces the
   values of all warps for itself: no second barrier broadcasts the result. Each reduction of a kernel has a place of
   its own in shared memory, so that none waits for the readers of the one before.

Rows stay in registers between reductions: a kernel reads its input once. Rows too long for that are read once per
sweep.

How a row is spread is a schedule decision (`row_form`), not a branch in the kernel: as many lanes of a warp as a row
has vectors, for rows of up to 1,024 elements, a block for longer ones, X so that registers suffice.

Method: Fang, Yu, Zhao, Zhou, "TurboTransformers" (PPoPP 2021), section 4.1.2, in the form without its faults: lanes
beyond the row hold the reduction's neutral element, rows may have any length, and the one-pass variance, which cancels
where |mean| >> std, is replaced by two passes over registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.numbers import from_float, to_float
from turbo_tvm.schedules.rows import RowFormat

WARP = 32
ACCESS_BYTES = 16
_WARP_ELEMENTS = 1024  # the longest row that a warp takes: 32 registers of a lane
_MAX_STRIP = 64  # a thread holds no more of a row in registers
_MAX_THREADS = 1024
_BLOCK_THREADS = 128  # of a block of warps with rows of their own, and of one that works on a row together
_FULL_MASK = 0xFFFFFFFF

Macro = Callable[..., None]
Combine = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class RowForm:
    """How rows of n elements are spread over threads.

    threads: of a team, which works on a row together: up to 32, or more for a block. rows: X, how many rows a team
    takes together. vector: elements per access. teams: per block.
    """

    n: int
    threads: int
    rows: int
    vector: int
    teams: int = 1

    @property
    def in_warp(self) -> bool:
        """Whether a team lies in a warp, and needs no barrier."""
        return self.threads <= WARP

    @property
    def warps(self) -> int:
        """Warps of a team."""
        return max(1, self.threads // WARP)

    @property
    def accesses(self) -> int:
        """Accesses of a thread to a row."""
        return -(-self.n // (self.threads * self.vector))

    @property
    def segments(self) -> int:
        """Pieces that a row is read in: one, unless it is too long for registers."""
        return -(-self.accesses * self.vector // _MAX_STRIP)

    @property
    def chunks(self) -> int:
        """Accesses of a thread to a segment."""
        return -(-self.accesses // self.segments)

    @property
    def whole_chunks(self) -> int:
        """Those of a segment, the first ones, that lie inside the row for every thread."""
        return self.n // (self.threads * self.vector) if self.segments == 1 else 0

    @property
    def strip(self) -> int:
        """Elements of a row that a thread holds."""
        return self.chunks * self.vector

    def blocks(self, count: Expr) -> Expr:
        """How many blocks so many rows take."""
        return (count + self.rows * self.teams - 1) // (self.rows * self.teams)

    def first_row(self, block: Expr, team: Expr) -> Expr:
        """The first row of a team."""
        return (block * self.teams + team) * self.rows


def vector_width(n: int, *formats: RowFormat) -> int:
    """Elements per access, of at most 16 bytes, so that n columns of rows in these formats are whole accesses."""
    width = ACCESS_BYTES // max(f.itemsize for f in formats)
    while any(columns % width for columns in (n, *(f.width for f in formats))):
        width //= 2
    return width


def row_form(
    n: int, vector: int, *, registers: int = 16, rows: int | None = None, threads: int | None = None
) -> RowForm:
    """The form for rows of n elements, or the one that is asked for.

    threads: of a team, a power of two; by default as many lanes of a warp as a row has vectors, for up to 1,024
    elements, else 128 threads, and more where those would hold over 64 elements each. rows: X; by default 2 where a
    thread's elements of both rows fit so many registers, else 1.
    """
    if threads is None:
        threads = min(WARP, _power_of_two(-(-n // vector))) if n <= _WARP_ELEMENTS else _BLOCK_THREADS
        while threads > WARP and threads < _MAX_THREADS and _MAX_STRIP * threads < n:
            threads *= 2
    one = RowForm(n, threads, 1, vector)
    if rows is None:
        rows = 2 if 2 * one.strip <= registers and one.segments == 1 else 1
    if rows not in (1, 2, 4, 8) or threads & (threads - 1) or not 1 <= threads <= _MAX_THREADS:
        raise ValueError(f"{rows} rows by {threads} threads: rows are 1, 2, 4 or 8, threads a power of two up to 1024")
    return replace(one, rows=rows, teams=_BLOCK_THREADS // threads if one.in_warp else 1)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def shuffle_xor(value: Expr, distance: int) -> Expr:
    """The value of the lane at that distance; all lanes of the warp take part."""
    return T.tvm_warp_shuffle_xor(T.uint32(_FULL_MASK), value, distance, WARP, WARP)


def butterfly_macro(count: int, width: int, combine: Combine) -> Macro:
    """`butterfly(values)`: every lane gets the combination of each of the values over `width` neighbouring lanes."""
    steps = width.bit_length() - 1

    @T.inline
    def butterfly(values):
        for step in T.unroll(steps):
            for i in T.unroll(count):
                values[i] = combine(values[i], shuffle_xor(values[i], T.shift_right(width // 2, step)))

    return butterfly


def all_reduce_macro(form: RowForm, combine: Combine, count: int) -> Macro:
    """`all_reduce(values, partials, stage, thread)`: each of `count` values combined over all threads of the team.

    values: local fp32 `(count,)`. partials: shared fp32 `(stages, count, warps)`, used where the team is a block; every
    reduction of a kernel has a stage of its own. thread: this one's number in the team.
    """
    in_warp = butterfly_macro(count, min(form.threads, WARP), combine)
    over_warps = butterfly_macro(count, form.warps, combine)

    @T.inline
    def all_reduce(values, partials, stage, thread):
        in_warp(values)
        if not form.in_warp:
            if thread % WARP == 0:
                for i in T.unroll(count):
                    partials[stage, i, thread // WARP] = values[i]
            T.tvm_storage_sync("shared")
            for i in T.unroll(count):
                values[i] = partials[stage, i, thread % form.warps]
            over_warps(values)

    return all_reduce


def add(a: Expr, b: Expr) -> Expr:
    """For sums."""
    return a + b


def largest(a: Expr, b: Expr) -> Expr:
    """For maxima."""
    return T.max(a, b)


@dataclass(frozen=True)
class Team:
    """Where a thread stands: its number in the team, the first of the team's rows, and how many rows there are."""

    form: RowForm
    thread: Expr
    first_row: Expr
    count: Expr

    def column(self, segment: Expr, chunk: Expr) -> Expr:
        """The first column of the thread's chunk."""
        return ((segment * self.form.chunks + chunk) * self.form.threads + self.thread) * self.form.vector

    def row(self, index: Expr) -> Expr:
        """A row to read: the last one stands for those past the end, whose results are not stored."""
        return T.min(self.first_row + index, self.count - 1)

    def has_row(self, index: Expr) -> Expr:
        """Whether that row exists, and its result is to be stored."""
        return self.first_row + index < self.count


def load_rows_macro(form: RowForm, dtype: str, neutral: float = 0.0, added: bool = False) -> Macro:
    """`load_rows(strip, x, team, segment)`: the thread's elements of its X rows as fp32, in local fp32 `(X, strip)`.

    x: `(rows, 1, width)` of that dtype. neutral: what stands for elements past the row. added: add to what is there.
    """
    fill = _fill_macro(form, dtype, neutral, added)

    @T.inline
    def load_rows(strip, x, team, segment):
        for row in T.unroll(form.rows):
            fill(strip, _row_of(x, team.row(row)), team, segment, row)

    return load_rows


def gather_rows_macro(form: RowForm, dtype: str, added: bool = False) -> Macro:
    """`gather_rows(strip, table, ids, team, segment)`: the same from rows of a table, by ids `(rows, 1)`."""
    fill = _fill_macro(form, dtype, 0.0, added)

    @T.inline
    def gather_rows(strip, table, ids, team, segment):
        for row in T.unroll(form.rows):
            fill(strip, _row_of(table, ids[team.row(row), 0]), team, segment, row)

    return gather_rows


def _row_of(x: tvm.tirx.Buffer, row: Expr) -> Callable[[Expr], Expr]:
    """Column -> element of that row of an `(rows, 1, width)` or `(rows, width)` buffer."""
    return lambda column: x[row, 0, column] if len(x.shape) == 3 else x[row, column]


def _fill_macro(form: RowForm, dtype: str, neutral: float, added: bool) -> Macro:
    """`fill(strip, element, team, segment, row)`: one of the X rows, from element(column)."""
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
    """`load_columns(local, vector, column)`: a chunk of a vector of that dtype, which all rows share."""
    width = min(form.vector, ACCESS_BYTES // tvm.DataType(dtype).itemsize)

    @T.inline
    def load_columns(local, vector, column):
        for i in T.unroll(form.vector // width):
            for j in T.vectorized(width):
                local[i * width + j] = vector[column + i * width + j]

    return load_columns


def add_vector_macro(form: RowForm, dtype: str) -> Macro:
    """`add_vector(strip, vector, team, segment)`: strip += a vector of that dtype, which all rows share."""
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
    """`each_chunk(team, segment, body)`: body(chunk, column) for the thread's chunks that lie inside the row."""
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
    """`store_chunk(out, team, column, element)`: element(row, position in chunk) from that column of the rows on."""

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
    """`strip_reduce(values, element)`: values combined with element(row, i) of the thread's strip, row by row.

    first: which of the values is that of the first row.
    """

    @T.inline
    def strip_reduce(values, element):
        for row in T.unroll(form.rows):
            for i in T.unroll(form.strip):
                values[first + row] = combine(values[first + row], element(row, i))

    return strip_reduce


def strip_map_macro(form: RowForm) -> Macro:
    """`strip_map(strip, team, segment, element)`: strip = element(row, i), and 0 past the end of the row."""
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
