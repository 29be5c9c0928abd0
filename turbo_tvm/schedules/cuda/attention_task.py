"""What the attention kernels share: a task, the rows of a head, scores, and the online softmax.

Numbered steps in the bodies are those of the strategy in `attention.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cuda.numbers import from_float
from turbo_tvm.schedules.cuda.reduction import ACCESS_BYTES, shuffle_xor

LANES = 2  # of a query
ROWS = 16  # queries of a warp
KEYS = (16, 32, 64)  # that may be at hand at a time
CHUNK = 4  # neighbouring columns that a lane takes; the next ones are the other lane's
_LOWEST = -1e37  # stands for -infinity, so that differences of such scores stay finite


@dataclass(frozen=True)
class Task:
    """A thread's place in its block, and the rows that the block works on."""

    warp: Expr  # of the block
    lane: Expr  # of the warp
    head: Expr
    first: Expr  # row of the block's first query
    begin: Expr  # row of the first key that the block visits
    end: Expr  # row after the last one

    @property
    def query(self) -> Expr:
        """Return the row of the lane's query; it may lie past the end."""
        return self.first + self.warp * ROWS + self.lane // LANES

    @property
    def side(self) -> Expr:
        """Return which of the query's two lanes this is."""
        return self.lane % LANES

    @property
    def thread(self) -> Expr:
        """Return the thread's number in the block."""
        return self.warp * 32 + self.lane


@dataclass(frozen=True)
class HeadRows:
    """The columns of a head in q, k and v, and the threads that read them."""

    head_dim: int
    dtype: str  # of q, k and v as TVM calls it
    threads: int  # of a block
    columns: tuple[tuple[int, int], ...]  # (width of a row, first column of head 0) in q, k and v
    group: int = 1  # heads of q that share one of k and v

    @property
    def itemsize(self) -> int:
        """Return the bytes of an element."""
        return tvm.DataType(self.dtype).itemsize

    @property
    def vector(self) -> int:
        """Return the elements per access: as many as 16 bytes hold, if heads and rows are whole accesses."""
        width = ACCESS_BYTES // self.itemsize
        while any(c % width for c in (self.head_dim, *sum(self.columns, ()))):
            width //= 2
        return width

    @property
    def padded(self) -> int:
        """Return the columns of a head in shared memory: those of whole fragments; the last ones are zero."""
        return -(-self.head_dim // 16) * 16

    @property
    def chunks(self) -> int:
        """Return how many groups of neighbouring columns a lane takes of a head."""
        return self.padded // (CHUNK * LANES)

    def column(self, which: int, head: Expr) -> Expr:
        """Return the head's first column in q, k or v, by its index."""
        return self.columns[which][1] + (head // self.group if which else head) * self.head_dim


@dataclass(frozen=True)
class Scores:
    """How scores follow from products of queries and keys."""

    scale: float
    max_length: int  # of a sequence; distances in the table of biases begin at 1 - max_length
    position_bias: bool  # whether there is such a table
    window: int | None = None  # how far a key may be from its query

    def score(self, product: Expr, task: Task, key: Expr, bias: tvm.tirx.Buffer) -> Expr:
        """Return the score of a key, in units of log 2; one that is not seen weighs nothing."""
        value = product * T.float32(self.scale * math.log2(math.e))
        if self.position_bias:
            distance = T.min(key, task.end - 1) - T.min(task.query, task.end - 1) + (self.max_length - 1)
            value = value + bias[task.head, distance] * T.float32(math.log2(math.e))
        seen = key < task.end  # 5. keys past the end
        if self.window is not None:
            # 4. the window's rim
            seen = T.And(seen, T.max(key - task.query, task.query - key) <= self.window)
        return T.Select(seen, value, T.float32(_LOWEST))


def load_tile_macro(rows: HeadRows, which: int, height: int) -> Macro:
    """Return `load_tile(tile, x, task, first_row)`: copy `height` rows of the head to shared memory.

    which: 0 for q, 1 for k, 2 for v. The last row of the sequence stands for those past it, zeros for the columns past
    the head's.
    """
    vector, threads = rows.vector, rows.threads
    per_row = rows.padded // vector
    pieces = height * per_row
    has_rest = pieces % threads != 0
    copy = _copy_piece_macro(rows, which)

    @T.inline
    def load_tile(tile, x, task, first_row):
        # 1. keys and values to shared memory, a piece of one access at a time
        for i in T.unroll(pieces // threads):
            copy(tile, x, task, first_row + (i * threads + task.thread) // per_row, i * threads + task.thread)
        if has_rest:  # noqa: SIM102  the outer one is decided when the kernel is built
            if pieces // threads * threads + task.thread < pieces:
                copy(
                    tile,
                    x,
                    task,
                    first_row + (pieces // threads * threads + task.thread) // per_row,
                    pieces // threads * threads + task.thread,
                )

    return load_tile


def _copy_piece_macro(rows: HeadRows, which: int) -> Macro:
    """Return `copy(tile, x, task, row, piece)`: copy one access of that row of x to its place in the tile."""
    vector, per_row = rows.vector, rows.padded // rows.vector
    ragged = rows.padded != rows.head_dim

    @T.inline
    def copy(tile, x, task, row, piece):
        column = T.meta_var(piece % per_row * vector)
        source = T.meta_var(rows.column(which, task.head) + column)
        # 5. past the end: the last row
        if ragged:
            if column < rows.head_dim:
                for j in T.vectorized(vector):
                    tile[piece // per_row, column + j] = x[T.min(row, task.end - 1), 0, source + j]
            else:
                for j in T.unroll(vector):
                    tile[piece // per_row, column + j] = T.cast(T.float32(0), rows.dtype)
        else:
            for j in T.vectorized(vector):
                tile[piece // per_row, column + j] = x[T.min(row, task.end - 1), 0, source + j]

    return copy


def start_macro(chunks: int) -> Macro:
    """Return `start(state, sums)`: set both as they are before the first keys."""

    @T.inline
    def start(state, sums):
        state[0] = T.float32(_LOWEST)
        state[1] = T.float32(0)
        for i in T.unroll(chunks * CHUNK):
            sums[i] = T.float32(0)

    return start


def softmax_step_macro(count: int, chunks: int, both: bool) -> Macro:
    """Return `softmax_step(scores, state, sums)`: turn scores into weights, and scale what was summed before to them.

    scores: local fp32 `(count,)`. state: local fp32 `(3,)`, the running maximum, the lane's sum of weights, and the
    factor of this step. sums: local fp32 `(chunks * CHUNK,)`. both: the query's lanes have different keys each.
    """

    @T.inline
    def softmax_step(scores, state, sums):
        # 2. online softmax: the running maximum
        state[2] = state[0]
        for i in T.unroll(count):
            state[0] = T.max(state[0], scores[i])
        if both:
            state[0] = T.max(state[0], shuffle_xor(state[0], 1))
        # 2. what was summed under the old maximum, scaled down to the new one
        state[2] = T.exp2(state[2] - state[0])
        state[1] = state[1] * state[2]
        for i in T.unroll(count):
            scores[i] = T.exp2(scores[i] - state[0])
            state[1] = state[1] + scores[i]
        for i in T.unroll(chunks * CHUNK):
            sums[i] = sums[i] * state[2]

    return softmax_step


def finish_macro(rows: HeadRows, out: Operand, both: bool) -> Macro:
    """Return `finish(task, state, sums, out)`: store the quotients in the row of the lane's query.

    both: the query's lanes have summed the weights of different keys each.
    """
    whole = rows.head_dim % CHUNK == 0 and out.width % CHUNK == 0
    vector = CHUNK if whole else 1

    @T.inline
    def finish(task, state, sums, out_rows):
        # 2. the sums of a query's two lanes meet
        if both:
            state[1] = state[1] + shuffle_xor(state[1], 1)
        state[2] = T.float32(1) / state[1]
        # 5. queries past the end are not stored
        if task.query < task.end:
            for i in T.unroll(rows.chunks):
                for part in T.unroll(CHUNK // vector):
                    column = T.meta_var((i * LANES + task.side) * CHUNK + part * vector)
                    if column < rows.head_dim:
                        with T.sblock("store"):
                            T.reads()
                            T.writes()
                            raw = T.sblock_alloc_buffer((vector,), out.dtype, scope="local")
                            for j in T.unroll(vector):
                                raw[j] = from_float(sums[i * CHUNK + part * vector + j] * state[2], out.dtype)
                            for j in T.vectorized(vector):
                                out_rows[task.query, 0, task.head * rows.head_dim + column + j] = raw[j]

    return finish
