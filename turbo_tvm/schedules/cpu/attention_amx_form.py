"""How a call of `attention_amx.py` is computed, and what its parallel iterations look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import amx
from turbo_tvm.schedules.cpu.attention_task import Heads, Operands, Rows, Span
from turbo_tvm.schedules.cpu.tiles import CpuTiles

QUERIES = 2 * amx.PAIRS  # of a task
KEYS = 2 * amx.ROWS  # of a block
LANES = amx.PAIRS  # 32-bit elements of a vector register
STEP = 2 * amx.PAIRS  # what a product sums over
_LINE_PAIRS = 16  # of a cache line


@dataclass(frozen=True)
class AmxForm:
    """How attention of some geometry is computed under one setting of the knobs."""

    tiles: CpuTiles
    geometry: Heads
    setting: Mapping[str, int]

    @property
    def pairs_of_head(self) -> int:
        """Pairs of a row of a head."""
        return self.geometry.head_dim // 2

    @property
    def most_keys(self) -> int:
        """Keys of a task, at most, rounded up to whole blocks."""
        return -(-self.geometry.keys_seen(QUERIES) // KEYS) * KEYS

    @property
    def value_width(self) -> int:
        """Pairs from a row of values to the next: no power of two, so a tile's rows lie in different sets of L1."""
        return self.most_keys // 2 + _LINE_PAIRS

    @property
    def fetches(self) -> bool:
        """Whether the next sequence's keys and values are asked for; with a window there is nothing to foresee."""
        return bool(self.setting["fetch"]) and self.geometry.window is None


@dataclass(frozen=True)
class KeyRows:
    """Rows of keys or values of a task; the last one stands for those that fill up a block."""

    rows: Rows
    begin: Expr
    end: Expr

    @property
    def blocks(self) -> Expr:
        """Blocks of keys."""
        return (self.end - self.begin + KEYS - 1) // KEYS

    def at(self, row: Expr, column: Expr) -> Expr:
        """Return an element of a row of the batch."""
        return self.rows.at(T.min(row, self.end - 1), column)


# What a parallel iteration remembers. In memory, because nested `T.let`s of such arithmetic keep TVM's simplifier busy
# for seconds.
TASK = 0  # the number of the task
STOP = 1  # the number to stop at
HEAD = 2  # its head
ROW = 3  # its row of `query_tiles`
FIRST = 4  # its span: see `attention_task.Span`
LAST = 5
BEGIN = 6
END = 7
PLACES = 8


@dataclass(frozen=True)
class AmxChunk:
    """What a parallel iteration works on."""

    operands: Operands  # q, k, v and out seen as pairs
    keys: tvm.tirx.Buffer  # (keys, head_dim / 2): those of the sequence and head, side by side
    values: tvm.tirx.Buffer  # (head_dim, keys / 2): their values, paired along keys and transposed
    place: tvm.tirx.Buffer  # int64 (PLACES,)

    @property
    def span(self) -> Span:
        """The queries and keys of the task."""
        return Span(self.place[FIRST], self.place[LAST], self.place[BEGIN], self.place[END])
