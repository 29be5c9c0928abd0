"""Embedding: a sum of rows that are looked up, and the layer norm over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from turbo_tvm.ops.operand import Role, Tensor, dims, operand, size_bytes, width
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class Embedding(Operator):
    """norm(the sum over i of tables[i][ids[i]]); without a norm where no gamma is given."""

    NAME = "embedding"

    ids: tuple[Tensor, ...] = operand(Role.INDICES, several=True, of="tables")  # as many as tables, in their order
    tables: tuple[Tensor, ...] = operand(Role.TABLE, several=True)  # (rows, columns) each
    gamma: Tensor = operand(Role.VECTOR, optional=True)
    beta: Tensor = operand(Role.VECTOR, optional=True)
    norm_eps: float | None = None

    def without_graph(self) -> Embedding:
        """Return the operator as its kernel sees it, which takes tables of any number of rows."""
        alone = super().without_graph()
        return replace(alone, tables=tuple(replace(table, shape=(None, table.width)) for table in alone.tables))

    @property
    def columns_out(self) -> int:
        return width(self.tables[0])

    def stored(self) -> Iterator[Stored]:
        yield Stored("out", self.out, self.columns_out)
        yield Stored("tables", self.tables[0], None)

    def option_words(self) -> dict[str, Any]:
        return {"norm_eps": self.norm_eps, "tables": len(self.tables)}

    def described(self) -> str:
        return f"{len(self.tables)} tables x {self.columns_out}"

    def flops_per_token(self) -> float:
        return float(self.columns_out * len(self.tables))

    def bytes_per_token(self, tokens: Any) -> int:
        looked_up = sum(size_bytes(table) // int(dims(table)[0]) for table in self.tables)
        return super().bytes_per_token(tokens) + looked_up
