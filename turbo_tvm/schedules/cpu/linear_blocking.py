"""How the matrix kernel of `linear.py` cuts a product, and the tile of the output that a task computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm.ir import Expr

from turbo_tvm.schedules.cpu.linear_product import Operands, Product
from turbo_tvm.schedules.cpu.linear_tasks import PANEL, UNIT, Tasks
from turbo_tvm.schedules.cpu.script import CACHE_LINE_FLOATS
from turbo_tvm.schedules.cpu.tiles import CpuTiles


@dataclass(frozen=True)
class Blocking:
    """How a product is cut into panels, blocks of rows and register tiles, under one setting of the knobs."""

    tiles: CpuTiles
    product: Product
    setting: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Rows of a row tile, R."""
        return self.tiles.row_tile

    @property
    def columns(self) -> int:
        """Columns of a panel, C."""
        return self.tiles.col_tile

    @property
    def panels(self) -> int:
        """Panels of the weight, P."""
        return self.tiles.panels(self.product.n)

    @property
    def tail_columns(self) -> int:
        """Columns of the last panel that exist, if not all of them do; else 0."""
        return self.product.n % self.columns

    @property
    def units(self) -> int:
        """Row tiles of a register tile."""
        return self.setting["tile_units"]

    @property
    def block_tiles(self) -> int:
        """Register tiles of a row block, at most."""
        return max(1, self.setting["block_rows"] // (self.rows * self.units))

    @property
    def group(self) -> int:
        """Steps of k that are spelt out and prefetch together."""
        return self.setting["group"]

    @property
    def lines(self) -> int:
        """Cache lines of a row of a panel."""
        return max(1, self.columns // CACHE_LINE_FLOATS)

    @property
    def tasks(self) -> Tasks:
        """What the numbering of tasks needs to know."""
        return Tasks(self.units, self.panels, self.product.steps, self.columns, self.group, self.setting["ahead"])


@dataclass(frozen=True)
class Tile:
    """A register tile of the output, which a task computes."""

    height: int  # rows
    place: tvm.tirx.Buffer  # where in the output it lies: see `linear_tasks.py`
    operands: Operands

    @property
    def unit(self) -> Expr:
        """Its first row tile."""
        return self.place[UNIT]

    @property
    def panel(self) -> Expr:
        """Its panel of the weight."""
        return self.place[PANEL]


@dataclass(frozen=True)
class Half:
    """Half of the accumulators of a register tile: TVM keeps two small buffers on the stack, not a large one."""

    acc: tvm.tirx.Buffer  # fp32 (height / 2, C)
    tile: Tile
    first_row: int  # within the tile

    @property
    def height(self) -> Expr:
        """Rows of this half."""
        return self.acc.shape[0]

    def index(self, rows: int, r: Expr, column: Expr) -> tuple[Expr, Expr, Expr]:
        """Return where row r of this half lies in a buffer of row tiles of `rows` rows, at that column."""
        row = self.first_row + r
        return self.tile.unit + row // rows, row % rows, column
