"""What a task of the attention kernel works on, and step 1 of its strategy: see `schedules/attention.py`.

A task is up to Q queries of one head against all keys of their sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Shuffle

from turbo_tvm.schedules.cpu.script import CACHE_LINE_BYTES

Macro = Callable[..., None]

LOWEST = -1e37  # stands for -infinity: differences of such scores stay finite


@dataclass(frozen=True)
class Rows:
    """The columns of one head in an activation buffer, addressed by packed row.

    The buffer holds fp32, bf16 bits (uint16), or pairs of bf16 (int32): `first_column` and `head_dim` then count pairs.
    """

    buffer: tvm.tirx.Buffer
    first_column: Expr
    head_dim: int

    def index(self, row: Expr, column: Expr) -> tuple[Expr, Expr, Expr]:
        """Where an element of the head lies in the buffer."""
        tile = self.buffer.shape[1]
        return row // tile, row % tile, self.first_column + column

    def at(self, row: Expr, column: Expr) -> Expr:
        """An element of the head."""
        return self.buffer[self.index(row, column)]

    @property
    def cache_lines(self) -> int:
        """How many lines a row of the head covers."""
        return -(-self.head_dim // self._per_line)

    @property
    def _per_line(self) -> int:
        return CACHE_LINE_BYTES // tvm.DataType(str(self.buffer.dtype)).itemsize

    def prefetch(self, row: Expr, line: Expr, write: bool = False) -> Expr:
        """Bring a line of a row into L1; the last row stands for those past the buffer."""
        row = T.min(row, self.buffer.shape[0] * self.buffer.shape[1] - 1)
        address = T.address_of(self.at(row, line * self._per_line))
        flags = (T.int32(int(write)), T.int32(3), T.int32(1))
        return T.evaluate(tvm.tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, *flags))


@dataclass(frozen=True)
class Distances:
    """Tables over the distance between query and key, of one head: see `schedules/distances.py`.

    of_keys, of_queries: A, met by the queries, and B, met by the keys. origin: where row 0 of the head has distance 0.
    width: from a row to the next.
    """

    of_keys: tvm.tirx.Buffer
    of_queries: tvm.tirx.Buffer
    origin: Expr
    width: int

    def at(self, task: Task, key: Expr) -> Expr:
        """Where row 0 has the distance from the first query to a key of the sequence."""
        return self.origin + task.first - task.begin - key


@dataclass(frozen=True)
class Task:
    """Queries [first, last) against the keys [begin, end), and the scratch: see the strategy."""

    first: Expr
    last: Expr
    begin: Expr
    end: Expr
    panel: tvm.tirx.Buffer
    weights: tvm.tirx.Buffer
    pairs: tvm.tirx.Buffer
    values: tvm.tirx.Buffer
    peak: tvm.tirx.Buffer
    inverse: tvm.tirx.Buffer
    diagonal: tvm.tirx.Buffer | None = None
    distances: Distances | None = None

    @property
    def queries(self) -> Expr:
        """Number of queries."""
        return self.last - self.first

    @property
    def keys(self) -> Expr:
        """Number of keys."""
        return self.end - self.begin


def transpose_macro(lanes: int) -> Macro:
    """`transpose(a, b)` transposes the block `(lanes, lanes)` in `a`, by exchanges at distance lanes / 2 ... 1.

    The result is in `b` when log2(lanes) is odd, else in `a`.
    """

    def mix(a: tvm.tirx.Buffer, row: Expr, distance: int, upper: bool) -> Expr:
        pick = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        if upper:
            pick = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        return Shuffle([a[row, T.ramp(0, 1, lanes)], a[row + distance, T.ramp(0, 1, lanes)]], pick)

    @T.inline
    def exchange(a, b, distance, again):
        for i in T.unroll(lanes // 2):
            row = T.meta_var(i // distance * distance * 2 + i % distance)
            b[row, T.ramp(0, 1, lanes)] = mix(a, row, distance, False)
            b[row + distance, T.ramp(0, 1, lanes)] = mix(a, row, distance, True)
        if distance > 1:
            again(b, a, distance // 2, again)

    @T.inline
    def transpose(a, b):
        exchange(a, b, lanes // 2, exchange)

    return transpose


def load_queries_macro(lanes: int, queries: int, columns: int, dtype: str) -> Macro:
    """`load_queries(task, q, out)`: step 1, for rows of q with so many columns. Lanes past the last query repeat it."""
    transpose, swapped = transpose_macro(lanes), lanes.bit_length() % 2 == 0
    whole = columns // lanes * lanes

    @T.inline
    def prefetch_next(task, q, out):
        for i in range(task.queries):
            for line in T.unroll(q.cache_lines):
                q.prefetch(task.last + i, line)
                out.prefetch(task.last + i, line, True)

    @T.inline
    def load_queries(task, q, out):
        prefetch_next(task, q, out)
        for block, group in T.grid(columns // lanes, (task.queries + lanes - 1) // lanes):
            with T.sblock("transpose"):
                T.reads()
                T.writes()
                a = T.sblock_alloc_buffer((lanes, lanes), dtype, scope="local")
                b = T.sblock_alloc_buffer((lanes, lanes), dtype, scope="local")
                for i in T.unroll(lanes):
                    row = T.meta_var(T.min(task.first + group * lanes + i, task.last - 1))
                    for j in T.vectorized(lanes):
                        a[i, j] = q.at(row, block * lanes + j)
                transpose(a, b)
                done = T.meta_var(b if swapped else a)
                for i in T.unroll(lanes):
                    for j in T.vectorized(lanes):
                        task.panel[block * lanes + i, group * lanes + j] = done[i, j]
        for d, j in T.grid(columns - whole, queries):
            task.panel[whole + d, j] = q.at(T.min(task.first + j, task.last - 1), whole + d)

    return load_queries


def load_bias_macro(queries: int, max_length: int, scale: float) -> Macro:
    """`load_bias(task, bias, head)`: the bias of query lane i, key j, over scale, goes to diagonal[keys - 1 - j + i].

    Reversed on the way in, so that the lanes of a score tile read it forwards. Lanes past the sequence may lie before
    the table: they read its first element.
    """

    @T.inline
    def load_bias(task, bias, head):
        for i in range(task.keys + queries - 1):
            column = T.meta_var(T.max(max_length - 1 + (task.end - 1 - task.first) - i, 0))
            task.diagonal[i] = T.max(bias[head, column] * T.float32(1 / scale), T.float32(LOWEST))

    return load_bias
