"""Rotary position embedding: heads turned by the position of their token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from turbo_tvm.ops.operand import Role, Tensor, dims, operand, width
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class Rotary(Operator):
    """The heads of each span turned by their row's position, the rest of the row as it is (RoFormer, half-split)."""

    NAME = "rotary"
    MAY_OVERWRITE = ("x",)

    x: Tensor = operand(Role.ROWS)
    position_ids: Tensor = operand(Role.INDICES, of="table")
    table: Tensor = operand(Role.TABLE)  # (positions, dims): the cosines of dims / 2 angles, then the sines
    columns: int  # of x that are used
    head_dim: int
    spans: tuple[tuple[int, int], ...]  # (first column, heads) of neighbouring heads that turn

    @property
    def positions(self) -> int:
        """How many positions the table has."""
        return int(dims(self.table)[0])

    @property
    def dims(self) -> int:
        """How many columns of a head turn, the first ones."""
        return width(self.table)

    @property
    def columns_out(self) -> int:
        return self.columns

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.x, self.columns)
        yield Stored("out", self.out, self.columns)

    def shape_words(self) -> list[str]:
        spans = "_".join(f"{heads}at{first}" for first, heads in self.spans)
        return [f"{self.columns}_{spans}x{self.head_dim}_turned{self.dims}_max{self.positions}"]

    def option_words(self) -> dict[str, Any]:
        return {}

    def flops_per_token(self) -> float:
        return 3.0 * self.columns


def joined_spans(spans: Sequence[tuple[int, int]], head_dim: int) -> tuple[tuple[int, int], ...]:
    """Return spans of heads, (first column, heads) each, where one that follows another directly is part of it."""
    joined: list[list[int]] = []
    for first, heads in sorted(spans):
        if joined and joined[-1][0] + joined[-1][1] * head_dim == first:
            joined[-1][1] += heads
        else:
            joined.append([first, heads])
    return tuple((first, heads) for first, heads in joined)
