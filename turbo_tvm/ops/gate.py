"""The gated linear unit (GLU) behind the two projections of a gated feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from turbo_tvm.ops.operand import Role, Tensor, operand
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class Gate(Operator):
    """activation(one half of a row) times the other half (Shazeer, arXiv 2002.05202)."""

    NAME = "gate"

    x: Tensor = operand(Role.ROWS)  # both halves side by side
    activation: str  # a name of schedules/common/vector_math.py
    columns: int  # of a half
    second: bool = False  # whether the activation is the second half's

    @property
    def columns_out(self) -> int:
        return self.columns

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.x, 2 * self.columns)
        yield Stored("out", self.out, self.columns)

    def option_words(self) -> dict[str, Any]:
        return {"activation": self.activation, "second": self.second}

    def flops_per_token(self) -> float:
        return 12.0 * self.columns
