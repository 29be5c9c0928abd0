"""What a call of the attention kernels works on, and a task of it: up to Q queries of one head against their keys.

See `attention.py` for the strategy.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Attention
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.script import CACHE_LINE_BYTES

LOWEST = -1e37  # stands for -infinity: differences of such scores stay finite


@dataclass(frozen=True)
class Heads:
    """The geometry of heads, and what is added to scores. q, k, v: (width of a row, first column of head 0)."""

    heads: int
    head_dim: int
    group: int  # neighbouring heads of q that share one of k and v
    scale: float  # of scores
    max_length: int  # rows of a sequence, at most
    window: int | None  # query i sees key j where |i - j| <= window
    q: tuple[int, int]
    k: tuple[int, int]
    v: tuple[int, int]
    in_pairs: bool = False  # whether q, k and v hold bf16, seen as pairs
    position_bias: bool = False
    key_distances: bool = False  # whether there is the table that queries meet
    query_distances: bool = False  # whether there is the table that keys meet
    distance_width: int = 1  # columns of these tables

    @staticmethod
    def of(operator: Attention) -> Heads:
        """Return what an operator's kernel works on."""
        q, k, v = operator.operand_columns
        return Heads(
            operator.heads,
            operator.head_dim,
            operator.heads // (operator.kv_heads or operator.heads),
            operator.scale,
            operator.max_length,
            operator.window,
            q,
            k,
            v,
            in_pairs=operator.q.dtype == bf16.STORAGE,
            position_bias=operator.position_bias is not None,
            key_distances=operator.key_table is not None,
            query_distances=operator.query_table is not None,
            distance_width=operator.distance_width,
        )

    @property
    def pair_type(self) -> str:
        """The dtype of an element of a panel."""
        return bf16.PAIR if self.in_pairs else "float32"

    @property
    def step(self) -> int:
        """Columns that an element of a panel holds."""
        return 2 if self.in_pairs else 1

    @property
    def panel_rows(self) -> int:
        """Elements of a row of a head, as a panel holds them."""
        return self.head_dim // self.step

    @property
    def table_size(self) -> int:
        """Elements of a table over distances."""
        return self.heads * self.panel_rows * self.distance_width

    def keys_seen(self, queries: int) -> int:
        """Return how many keys so many neighbouring queries see at most."""
        return self.max_length if self.window is None else min(self.max_length, queries + 2 * self.window)


@dataclass(frozen=True)
class Operands:
    """The buffers of a call; those that are not given are not looked at."""

    q: tvm.tirx.Buffer
    k: tvm.tirx.Buffer
    v: tvm.tirx.Buffer
    query_tiles: tvm.tirx.Buffer
    out: tvm.tirx.Buffer
    bias: tvm.tirx.Buffer | None = None  # fp32 (heads, 2 * max_length - 1)
    of_keys: tvm.tirx.Buffer | None = None  # the tables of `distances.py`
    of_queries: tvm.tirx.Buffer | None = None


@dataclass(frozen=True)
class Rows:
    """The columns of one head in an activation buffer, addressed by packed row.

    The buffer holds fp32, bf16 bits (uint16), or pairs of bf16 (int32): `first_column` and `head_dim` then count pairs.
    """

    buffer: tvm.tirx.Buffer
    first_column: Expr
    head_dim: int

    def index(self, row: Expr, column: Expr) -> tuple[Expr, Expr, Expr]:
        """Return where an element of the head lies in the buffer."""
        tile = self.buffer.shape[1]
        return row // tile, row % tile, self.first_column + column

    def at(self, row: Expr, column: Expr) -> Expr:
        """Return an element of the head."""
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
    """Tables over the distance between query and key, of one head: see `distances.py`."""

    of_keys: tvm.tirx.Buffer | None  # A, met by the queries
    of_queries: tvm.tirx.Buffer | None  # B, met by the keys
    origin: Expr  # where row 0 of the head has distance 0
    width: int  # from a row to the next

    def at(self, task: Task, key: Expr) -> Expr:
        """Return where row 0 has the distance from the first query to a key of the sequence."""
        return self.origin + task.first - task.begin - key


@dataclass(frozen=True)
class Head:
    """What a task reads and writes of one head."""

    q: Rows
    k: Rows
    v: Rows
    out: Rows


@dataclass(frozen=True)
class Span:
    """Queries [first, last) against the keys [begin, end): rows of the batch."""

    first: Expr
    last: Expr
    begin: Expr
    end: Expr

    @property
    def queries(self) -> Expr:
        """Number of queries."""
        return self.last - self.first

    @property
    def keys(self) -> Expr:
        """Number of keys."""
        return self.end - self.begin


@dataclass(frozen=True)
class Task(Span):
    """A span and the scratch for it: Q queries lie across the columns."""

    panel: tvm.tirx.Buffer  # (head_dim, Q): the queries, transposed
    weights: tvm.tirx.Buffer  # fp32 (keys, Q): scores, then what they weigh
    pairs: tvm.tirx.Buffer  # (keys / 2, Q): weights in bf16, of two keys each
    values: tvm.tirx.Buffer  # the values of two keys each, in bf16
    peak: tvm.tirx.Buffer  # fp32 (Q,): the greatest score of a query
    inverse: tvm.tirx.Buffer  # fp32 (Q,): the sum of its weights, in the end 1 over it
    diagonal: tvm.tirx.Buffer | None = None  # fp32: the biases of the span, see `load_bias_macro`
    distances: Distances | None = None
