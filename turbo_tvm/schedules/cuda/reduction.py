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

How a row is spread is a schedule decision (`row_space`), not a branch in the kernel. By itself (`row_form`), as many
lanes of a warp as a row has vectors, for rows of up to 1,024 elements, a block for longer ones, X so that registers
suffice.

Method: Fang, Yu, Zhao, Zhou, "TurboTransformers" (PPoPP 2021), section 4.1.2, in the form without its faults: lanes
beyond the row hold the reduction's neutral element, rows may have any length, and the one-pass variance, which cancels
where |mean| >> std, is replaced by two passes over registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Knob, Macro, Setting, Space, Variant
from turbo_tvm.schedules.cuda.script import only_setting

WARP = 32
ACCESS_BYTES = 16
_WARP_ELEMENTS = 1024  # the longest row that a warp takes: 32 registers of a lane
_MAX_STRIP = 64  # a thread holds no more of a row in registers
_MAX_THREADS = 1024
_MOST_HELD = 72  # elements of all its rows that a thread may hold in registers
_FEWEST_THREADS = 4  # of a team, unless a row is shorter: fewer would read memory far apart
_BLOCK_THREADS = 128  # of a block of warps with rows of their own, and of one that works on a row together
_FULL_MASK = 0xFFFFFFFF

Combine = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class RowForm:
    """How rows of n elements are spread over threads."""

    n: int
    threads: int  # of a team, which works on a row together: up to 32 in a warp, or a block of more
    rows: int  # X, how many rows a team takes together
    vector: int  # elements per access
    teams: int = 1  # of a block

    @property
    def in_warp(self) -> bool:
        """Return whether a team lies in a warp, and needs no barrier."""
        return self.threads <= WARP

    @property
    def warps(self) -> int:
        """Return the warps of a team."""
        return max(1, self.threads // WARP)

    @property
    def accesses(self) -> int:
        """Return the accesses of a thread to a row."""
        return -(-self.n // (self.threads * self.vector))

    @property
    def segments(self) -> int:
        """Return the pieces that a row is read in: one, unless it is too long for registers."""
        return -(-self.accesses * self.vector // _MAX_STRIP)

    @property
    def chunks(self) -> int:
        """Return the accesses of a thread to a segment."""
        return -(-self.accesses // self.segments)

    @property
    def whole_chunks(self) -> int:
        """Return how many accesses to a segment, the first ones, lie inside the row for every thread."""
        return self.n // (self.threads * self.vector) if self.segments == 1 else 0

    @property
    def strip(self) -> int:
        """Return how many elements of a row a thread holds."""
        return self.chunks * self.vector

    def blocks(self, count: Expr) -> Expr:
        """Return how many blocks so many rows take."""
        return (count + self.rows * self.teams - 1) // (self.rows * self.teams)

    def first_row(self, block: Expr, team: Expr) -> Expr:
        """Return the first row of a team."""
        return (block * self.teams + team) * self.rows


def vector_width(n: int, *formats: Operand) -> int:
    """Return the elements per access, of at most 16 bytes, of which n columns in all these formats are whole ones."""
    width = ACCESS_BYTES // max(f.itemsize for f in formats)
    while any(columns % width for columns in (n, *(f.width for f in formats))):
        width //= 2
    return width


def row_form(
    n: int, vector: int, *, registers: int = 16, rows: int | None = None, threads: int | None = None
) -> RowForm:
    """Return the form for rows of n elements, or the one that is asked for.

    threads: of a team, a power of two; by default as many lanes of a warp as a row has vectors, for up to 1,024
    elements, else 128 threads, and more where those would hold over 64 elements each.
    rows: X; by default 2 where a thread's elements of both rows fit so many registers, else 1.

    Raises ValueError for a form that does not exist.
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


def row_space(n: int, vector: int, *, registers: int = 16) -> Space:
    """Return the decisions of a kernel on rows of n elements.

    The default is `row_form(n, vector, registers=registers)`.

    A team has work for all its threads, which hold their parts of all its rows in registers; only rows that are too
    long even for the largest team are read in segments.
    """
    usual = row_form(n, vector, registers=registers)
    teams = [1 << i for i in range(_MAX_THREADS.bit_length())]

    def is_fast(threads: int) -> bool:
        few, many = min(_FEWEST_THREADS, usual.threads), _power_of_two(-(-n // vector))
        return few <= threads <= many and RowForm(n, threads, 1, vector).segments == 1

    def fits(setting: Setting) -> bool:
        form = row_form(n, vector, **setting)
        return form.rows * form.strip <= _MOST_HELD and (form.rows == 1 or form.segments == 1)

    return Space(
        (
            Knob("rows", (1, 2, 4), usual.rows, "rows that a team reduces together"),
            Knob("threads", tuple(t for t in teams if t == usual.threads or is_fast(t)), usual.threads, "of a team"),
        ),
        fits,
    )


def chosen_form(n: int, vector: int, variants: Sequence[Variant], *, registers: int = 16) -> RowForm:
    """Return the form that the only variant asks for, or the default one."""
    return row_form(n, vector, **only_setting(variants, row_space(n, vector, registers=registers)))


def _power_of_two(count: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def shuffle_xor(value: Expr, distance: int) -> Expr:
    """Return the value of the lane at that distance; all lanes of the warp take part."""
    return T.tvm_warp_shuffle_xor(T.uint32(_FULL_MASK), value, distance, WARP, WARP)


def butterfly_macro(count: int, width: int, combine: Combine) -> Macro:
    """Return `butterfly(values)`: give every lane each of the values, combined over `width` neighbouring lanes."""
    steps = width.bit_length() - 1

    @T.inline
    def butterfly(values):
        for step in T.unroll(steps):
            for i in T.unroll(count):
                values[i] = combine(values[i], shuffle_xor(values[i], T.shift_right(width // 2, step)))

    return butterfly


def all_reduce_macro(form: RowForm, combine: Combine, count: int) -> Macro:
    """Return `all_reduce(values, partials, stage, thread)`: combine each of `count` values over the team.

    values: local fp32 `(count,)`. partials: shared fp32 `(stages, count, warps)`, used where the team is a block; every
    reduction of a kernel has a stage of its own. thread: this one's number in the team.
    """
    in_warp = butterfly_macro(count, min(form.threads, WARP), combine)
    over_warps = butterfly_macro(count, form.warps, combine)

    @T.inline
    def all_reduce(values, partials, stage, thread):
        # 1. in a warp
        in_warp(values)
        # 2. in a block
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
    """Combine two parts of a sum."""
    return a + b


def largest(a: Expr, b: Expr) -> Expr:
    """Combine two maxima."""
    return T.max(a, b)
