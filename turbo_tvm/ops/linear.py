"""A product of rows with a weight, and what its kernel does to the rows while it has them in registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from turbo_tvm.ops import formats
from turbo_tvm.ops.operand import Role, Tensor, dims, dtype_of, operand, width
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class Linear(Operator):
    """norm(activation(x w^T + bias) + residual): the last three where they are given."""

    NAME = "linear"
    MAY_OVERWRITE = ("residual",)

    x: Tensor = operand(Role.ROWS)
    weight: Tensor = operand(Role.WEIGHT)  # (n, k) as PyTorch stores it; packed: (panels, k / per word, col_tile)
    bias: Tensor = operand(Role.VECTOR)  # (n,); packed: (panels * col_tile,)
    residual: Tensor = operand(Role.ROWS, optional=True)
    gamma: Tensor = operand(Role.VECTOR, optional=True)
    beta: Tensor = operand(Role.VECTOR, optional=True)
    activation: str | None = None  # a name of schedules/common/vector_math.py
    norm_eps: float | None = None  # of the layer norm over each row, None without one
    columns: int | None = None  # n, where the rows of the result are wider

    @property
    def k(self) -> int:
        """How many columns of x a product sums over."""
        return int(dims(self.weight)[1]) * formats.per_element(dtype_of(self.weight))

    @property
    def n(self) -> int:
        """How many columns the result has."""
        return self.columns_out

    @property
    def columns_out(self) -> int:
        return self.columns or width(self.out)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is fused into it but its bias."""
        return self.activation is None and self.residual is None and self.norm_eps is None

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.x, self.k)
        if self.residual is not None:
            yield Stored("extra", self.residual, self.n)
        yield Stored("out", self.out, self.n)

    def shape_words(self) -> list[str]:
        return [f"{self.k}x{self.n}"]

    def option_words(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "residual": self.residual is not None,
        }

    def described(self) -> str:
        return f"{self.k} -> {self.n}"

    def flops_per_token(self) -> float:
        return 2.0 * self.k * self.n
