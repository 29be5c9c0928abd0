"""Changes of how rows are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from turbo_tvm.ops.operand import Role, Tensor, operand
from turbo_tvm.ops.operator import Operator, Stored


@dataclass(frozen=True, kw_only=True)
class CastRows(Operator):
    """Rows in fp32 to the format of the result."""

    NAME = "cast_rows"

    x: Tensor = operand(Role.ROWS)

    def stored(self) -> Iterator[Stored]:
        yield Stored("out", self.out, self.columns_out)


@dataclass(frozen=True, kw_only=True)
class TileRows(Operator):
    """(rows, columns) to (tiles, row_tile, columns), for graphs that stay padded; surplus rows are zero."""

    NAME = "tile_rows"

    x: Tensor = operand(Role.ROWS)


@dataclass(frozen=True, kw_only=True)
class UntileRows(Operator):
    """(tiles, row_tile, columns) to (rows, columns), without the surplus rows."""

    NAME = "untile_rows"

    x: Tensor = operand(Role.ROWS)
