"""Pooling: from a row per token to a row per sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from turbo_tvm.ops.operand import Role, Tensor, operand
from turbo_tvm.ops.operator import Operator, Stored

PoolMode = Literal["first", "mean"]
LARGEST = -1  # in the place of a token id: the largest one of a sequence


@dataclass(frozen=True, kw_only=True)
class Pool(Operator):
    """The mean of a sequence's rows, or one of them.

    `mask` is given while the graph is padded; once it is packed `cu_seqlens`, or `pooled_rows` where an id decides.
    """

    NAME = "pool"

    x: Tensor = operand(Role.ROWS)
    mask: Tensor = operand(Role.MASK, optional=True)
    cu_seqlens: Tensor = operand(Role.CU_SEQLENS, optional=True)
    pooled_rows: Tensor = operand(Role.POOLED_ROWS, optional=True)
    mode: PoolMode
    row: int = 0  # of "first": which row of the sequence
    token: int | None = None  # of "first": the first row with that token id, of the largest id for `LARGEST`

    def without_graph(self) -> Pool:
        """Return the operator as its kernel sees it, which takes any rows, whoever says which."""
        alone = super().without_graph()
        places = alone.pooled_rows if alone.cu_seqlens is None else alone.cu_seqlens
        return replace(alone, token=None, cu_seqlens=places, pooled_rows=None)

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.x, self.columns_out)

    def option_words(self) -> dict[str, Any]:
        return {"mode": self.mode, "row": self.row or None}
