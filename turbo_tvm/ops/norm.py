"""Normalisation of rows, each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from turbo_tvm.ops.operand import Role, Tensor, dims, operand, width
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class Norm(Operator):
    """Layer norm of each row of x [+ residual]; RMS norm where there is no beta."""

    NAME = "norm"
    MAY_OVERWRITE = ("x", "residual")

    x: Tensor = operand(Role.ROWS)
    residual: Tensor = operand(Role.ROWS, optional=True)
    gamma: Tensor = operand(Role.VECTOR)
    beta: Tensor = operand(Role.VECTOR, optional=True)
    eps: float

    @property
    def is_rms(self) -> bool:
        """Whether rows are divided by the root of their mean square, and not shifted."""
        return self.beta is None

    @property
    def columns_out(self) -> int:
        return int(dims(self.gamma)[0])

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.x, self.columns_out)
        if self.residual is not None:
            yield Stored("extra", self.residual, self.columns_out)
        yield Stored("out", self.out, self.columns_out)

    def option_words(self) -> dict[str, Any]:
        return {"eps": self.eps, "kind": "rms" if self.is_rms else None, "residual": self.residual is not None}

    def flops_per_token(self) -> float:
        return 8.0 * self.columns_out


@dataclass(frozen=True, kw_only=True)
class L2Normalize(Operator):
    """Each row of x over max(its Euclidean length, eps)."""

    NAME = "normalize"
    MAY_OVERWRITE = ("x",)

    x: Tensor = operand(Role.ROWS)
    eps: float
    columns: int | None = None  # of x that are used, where the rows of the result are wider

    @property
    def columns_out(self) -> int:
        return self.columns or width(self.out)

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.x, self.columns_out)
        yield Stored("out", self.out, self.columns_out)

    def option_words(self) -> dict[str, Any]:
        return {"eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class Softmax(Operator):
    """e^x of each element over the sum of these in its row."""

    NAME = "softmax"

    x: Tensor = operand(Role.ROWS)
    columns: int | None = None  # of x that are used, where the rows of the result are wider

    @property
    def columns_out(self) -> int:
        return self.columns or width(self.out)

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.x, self.columns_out)
        yield Stored("out", self.out, self.columns_out)
