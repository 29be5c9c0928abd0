"""Weights into the layout and format of kernels. These run once, on the CPU that compiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from turbo_tvm.ops import formats
from turbo_tvm.ops.operand import Role, Tensor, dims, dtype_of, operand, width
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class PackWeight(Operator):
    """(n, k) in fp32 to panels (panels, k / per word, col_tile) in the format of the result."""

    NAME = "pack_weight"

    weight: Tensor = operand(Role.WEIGHT)

    @property
    def n(self) -> int:
        """Rows of the weight: columns of the product."""
        return int(dims(self.weight)[0])

    @property
    def k(self) -> int:
        """Columns of the weight: what the product sums over."""
        return width(self.weight)

    @property
    def in_pairs(self) -> bool:
        """Whether an element of the result holds neighbours along k."""
        return formats.per_element(dtype_of(self.out)) > 1

    def stored(self) -> Iterator[Stored]:
        yield Stored("out", self.out, None)

    def shape_words(self) -> list[str]:
        return [f"{self.k}x{self.n}"]

    def option_words(self) -> dict[str, Any]:
        return {"pairs": self.in_pairs}


@dataclass(frozen=True, kw_only=True)
class PackBias(Operator):
    """(n,) to (panels * col_tile,), filled up with zeros."""

    NAME = "pack_bias"

    bias: Tensor = operand(Role.VECTOR)

    @property
    def n(self) -> int:
        """Columns of the product."""
        return width(self.bias)

    def shape_words(self) -> list[str]:
        return [str(self.n)]


@dataclass(frozen=True, kw_only=True)
class CastWeight(Operator):
    """A table or a vector in fp32 to the format of the result."""

    NAME = "cast_weight"

    weight: Tensor = operand(Role.WEIGHT)

    def stored(self) -> Iterator[Stored]:
        yield Stored("out", self.out, None)

    def shape_words(self) -> list[str]:
        return ["x".join(str(d) for d in dims(self.weight))]


@dataclass(frozen=True, kw_only=True)
class PackDistances(Operator):
    """A table (heads, head_dim, 2L - 1) over distances i - j to the layout of the attention kernel."""

    NAME = "pack_distances"

    table: Tensor = operand(Role.TABLE)
    row_width: int  # columns of a row of the result, at least 2L - 1

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return int(dims(self.table)[0])

    @property
    def head_dim(self) -> int:
        """Columns of a head."""
        return int(dims(self.table)[1])

    @property
    def columns(self) -> int:
        """How many distances there are."""
        return width(self.table)

    @property
    def in_pairs(self) -> bool:
        """Whether an element of the result holds neighbouring columns of a head."""
        return formats.per_element(dtype_of(self.out)) > 1

    def shape_words(self) -> list[str]:
        return [f"{self.heads}x{self.head_dim}x{self.columns}x{self.row_width}"]

    def option_words(self) -> dict[str, Any]:
        return {"pairs": self.in_pairs}
