"""How a call of `attention.py` is computed, and what its parallel iterations and tasks look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm.ir import Expr

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_scores import bf16_accumulate_macro, fp32_accumulate_macro
from turbo_tvm.schedules.cpu.attention_task import Distances, Head, Heads, Operands, Rows
from turbo_tvm.schedules.cpu.tiles import CpuTiles

NARROW_LEFTOVER = 8  # keys that are left over, with one vector


@dataclass(frozen=True)
class Form:
    """How attention of some geometry is computed under one setting of the knobs."""

    tiles: CpuTiles
    geometry: Heads
    setting: Mapping[str, int]

    @property
    def most_keys(self) -> int:
        """Keys of a task, at most."""
        return self.geometry.keys_seen(self.tiles.query_tile)

    @property
    def scratch_keys(self) -> int:
        """Rows of scores: a leftover tile ends less than its height past the last key."""
        return self.most_keys + NARROW_LEFTOVER

    @property
    def scratch_pairs(self) -> int:
        """Rows of weights and values of two keys each; 1 where there are none."""
        return (self.most_keys + 1) // 2 if self.geometry.in_pairs else 1

    @property
    def value_columns(self) -> int:
        """Columns of such values: whole vectors."""
        lanes, head_dim = self.tiles.lanes, self.geometry.head_dim
        return -(-head_dim // lanes) * lanes if self.geometry.in_pairs else 1

    @property
    def diagonal_size(self) -> int:
        """Biases of a task; 1 where there are none."""
        return self.most_keys + self.tiles.query_tile if self.geometry.position_bias else 1

    @property
    def accumulate(self) -> Macro:
        """The product of a broadcast and a row of a buffer."""
        return bf16_accumulate_macro(self.tiles.lanes) if self.geometry.in_pairs else fp32_accumulate_macro()


@dataclass(frozen=True)
class Chunk:
    """What a parallel iteration works on."""

    operands: Operands  # q and k in pairs if the kernel sees them so
    values: tvm.tirx.Buffer  # values of the sequence and head, of two keys each
    seen: tvm.tirx.Buffer  # int64 (2,): the keys that some query of a task sees


def head_of(geometry: Heads, operands: Operands, number: Expr) -> Head:
    """Return the rows of a head of q and out, and of the head of k and v that it looks at."""
    shared = number // geometry.group
    q, k, v = (column for _, column in (geometry.q, geometry.k, geometry.v))
    return Head(
        _rows(geometry, operands.q, number, q),
        _rows(geometry, operands.k, shared, k),
        _rows(geometry, operands.v, shared, v),
        _rows(geometry, operands.out, number, 0),
    )


def _rows(geometry: Heads, buffer: tvm.tirx.Buffer, number: Expr, column: int) -> Rows:
    """Return the head's rows; in pairs if that is how the buffer looks at them."""
    per = 2 if str(buffer.dtype) == bf16.PAIR else 1
    return Rows(buffer, column // per + number * (geometry.head_dim // per), geometry.head_dim // per)


def distances_of(geometry: Heads, operands: Operands, number: Expr) -> Distances:
    """Return a head's tables over distances."""
    origin = number * (geometry.panel_rows * geometry.distance_width) + (geometry.max_length - 1)
    return Distances(operands.of_keys, operands.of_queries, origin, geometry.distance_width)
