"""Attention: softmax(scale Q K^T + biases) V, per sequence and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbo_tvm.ops import formats
from turbo_tvm.ops.operand import Operand, Role, Tensor, dtype_of, operand, width
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class Attention(Operator):
    """Attention of all heads. A head of q, k or v is `head_dim` columns of the rows of that operand.

    `mask` is given while the graph is padded, `query_tiles` once it is packed.
    """

    NAME = "attention"

    q: Tensor = operand(Role.ROWS)  # q, k and v may be the same rows
    k: Tensor = operand(Role.ROWS)
    v: Tensor = operand(Role.ROWS)
    mask: Tensor = operand(Role.MASK, optional=True)
    query_tiles: Tensor = operand(Role.QUERY_TILES, optional=True)
    position_bias: Tensor = operand(Role.TABLE, optional=True)  # (heads, 2 * max_length - 1), added by distance
    key_table: Tensor = operand(Role.TABLE, optional=True)  # weights by distance that queries are multiplied with
    query_table: Tensor = operand(Role.TABLE, optional=True)  # weights by distance that keys are multiplied with
    heads: int
    head_dim: int
    scale: float
    max_length: int  # tokens; tables over distances reach up to it
    first_columns: tuple[int, int, int]  # of head 0 in the rows of q, k and v
    kv_heads: int | None = None  # heads of k and v, if fewer than those of q
    window: int | None = None  # query i sees key j where |i - j| <= window

    @property
    def inner(self) -> int:
        """Columns of all heads of q."""
        return self.heads * self.head_dim

    @property
    def columns_out(self) -> int:
        return self.inner

    @property
    def operand_columns(self) -> tuple[tuple[int, int], ...]:
        """(width of the rows, first column of head 0) of q, k and v."""
        widths = (width(t) for t in (self.q, self.k, self.v))
        return tuple(zip(widths, self.first_columns, strict=True))

    @property
    def distance_tables(self) -> tuple[Tensor, ...]:
        """The tables over distances whose rows tokens are multiplied with."""
        return tuple(table for table in (self.key_table, self.query_table) if table is not None)

    @property
    def distance_width(self) -> int:
        """Columns of a packed table over distances; 1 without one."""
        if not self.distance_tables:
            return 1
        table = self.distance_tables[0]
        return width(table) * formats.per_element(dtype_of(table)) // self.inner

    @property
    def is_relative(self) -> bool:
        """Whether it looks at the distance between tokens."""
        return bool(self.distance_tables) or self.position_bias is not None or self.window is not None

    def stored(self) -> Iterator[Stored]:
        yield Stored("x", self.q, None)
        yield Stored("out", self.out, self.inner)

    def shape_words(self) -> list[str]:
        scale, usual = np.float32(self.scale), np.float32(self.head_dim**-0.5)
        extra = "" if scale == usual else f"_scale{scale:.9g}"
        return [f"{self.heads}x{self.head_dim}_{self._where_heads_lie()}_max{self.max_length}{extra}"]

    def _where_heads_lie(self) -> str:
        inner, columns = self.inner, self.operand_columns
        total = columns[0][0]
        known = {"merged": tuple((3 * inner, i * inner) for i in range(3)), "separate": ((inner, 0),) * 3}
        known[f"merged_in{total}"] = tuple((total, i * inner) for i in range(3))
        spelt = "_".join(f"{wide}at{first}" for wide, first in columns)
        return next((word for word, usual in known.items() if usual == columns), spelt)

    def option_words(self) -> dict[str, Any]:
        return {
            "kv_heads": self.kv_heads,
            "window": self.window,
            "key_distances": self.key_table is not None,
            "query_distances": self.query_table is not None,
        }

    def extra_words(self) -> list[str]:
        return ["bias"] if self.position_bias is not None else []

    def described(self) -> str:
        return f"{self.heads} heads x {self.head_dim}"

    def flops_per_token(self) -> float:
        return self._flops_of_a_pair() * (2 * self.window + 1) if self.window is not None else 0.0

    def flops_per_pair(self) -> float:
        return self._flops_of_a_pair() if self.window is None else 0.0

    def _flops_of_a_pair(self) -> float:
        return 2.0 * (2 + len(self.distance_tables)) * self.inner

    def buffer_of(self) -> dict[str, str]:
        """Return for q, k and v the first of them that lies in the same tensor.

        Operands have no identity: two that are alike, with heads at different columns, are taken for one tensor.
        """
        names, found = ("q", "k", "v"), {}
        for i, name in enumerate(names):
            found[name] = next((names[j] for j in range(i) if self._is_shared(names[j], name)), name)
        return found

    def buffers(self) -> list[Tensor]:
        shared = {name for name, owner in self.buffer_of().items() if name != owner}
        return [argument.tensor for argument in self.arguments() if argument.name not in shared]

    def _is_shared(self, one: str, other: str) -> bool:
        left, right = getattr(self, one), getattr(self, other)
        if not isinstance(left, Operand):
            return left.same_as(right)
        firsts = dict(zip(("q", "k", "v"), self.first_columns, strict=True))
        return left == right and firsts[one] != firsts[other]
