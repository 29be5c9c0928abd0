"""A run of tasks of `linear_amx.py`: how its product is cut, what it works on, and step 5 of the strategy.

What a run remembers lies in a small int64 buffer, its state: nested `T.let`s of such arithmetic keep TVM's simplifier
busy for seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.linear_product import Operands, Product
from turbo_tvm.schedules.cpu.script import CACHE_LINE_FLOATS
from turbo_tvm.schedules.cpu.tiles import CpuTiles

HEIGHT, WIDTH = 2 * amx.ROWS, 2 * amx.PAIRS  # of a tile of the output: four accumulators

# What a state holds.
SHAPE = 0  # the rows that the tiles are configured for, 0 if for none
UNIT = 1  # of the tile before, which waits in `acc`: its first row tile
PANEL = 2  # its panel
ROWS = 3  # its rows
LINES = 4  # of the weights to prefetch: cache lines in a step
AHEAD = 5  # how far into the panel and beyond, in elements
TASK = 6  # the number of the task
END = 7  # the number to stop at
NEXT_UNIT = 8  # of the task's tile: its first row tile
NEXT_PANEL = 9  # its panel
NEXT_ROWS = 10  # its rows
_FIRST = 11  # the first tile of its block
_IN_BLOCK = 12  # tiles of its block
_WITHIN = 13  # its number within what was divided last
REMEMBERED = 14


@dataclass(frozen=True)
class AmxBlocking:
    """How a product is cut into panels, blocks of rows and tiles, under one setting of the knobs."""

    tiles: CpuTiles
    product: Product
    setting: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Rows of a row tile, R."""
        return self.tiles.row_tile

    @property
    def units(self) -> int:
        """Row tiles of a whole tile."""
        return HEIGHT // self.rows

    @property
    def panels(self) -> int:
        """Panels of the weight."""
        return self.tiles.panels(self.product.n)

    @property
    def tail_columns(self) -> int:
        """Columns of the last panel that exist, if not all of them do; else 0."""
        return self.product.n % WIDTH

    @property
    def whole_steps(self) -> int:
        """Steps of 32 of k."""
        return self.product.steps // amx.PAIRS

    @property
    def rest_pairs(self) -> int:
        """Pairs of k that are left over."""
        return self.product.steps % amx.PAIRS

    @property
    def step_lines(self) -> int:
        """Cache lines of a step's weights."""
        return amx.PAIRS * WIDTH // CACHE_LINE_FLOATS

    @property
    def step_rows(self) -> int:
        """Rows of the tile before that a step finishes."""
        return max(-(-HEIGHT // max(self.whole_steps, 1)), self.setting["finish_rows"])

    @property
    def packs(self) -> bool:
        """Whether the CPU's conversion makes bf16 of finished rows."""
        return bool(self.setting["pack"]) and self.product.out.dtype == bf16.STORAGE


@dataclass(frozen=True)
class Run:
    """What a run of tasks works on."""

    state: tvm.tirx.Buffer  # int64 (REMEMBERED,)
    acc: tvm.tirx.Buffer  # fp32 (HEIGHT, WIDTH): the tile before, to be finished
    shapes: tvm.tirx.Buffer  # int64 (8,): see `amx.configure`
    operands: Operands


def locate_macro(cut: AmxBlocking) -> Macro:
    """`locate(state, t, count)`: step 5: the tile of the task, one of `count` of t row tiles, and its prefetches."""
    rows, panels, units = cut.rows, cut.panels, cut.units
    block_tiles, step_lines, lone_bytes = cut.setting["block_tiles"], cut.step_lines, cut.setting["ahead_kib"] << 10

    @T.inline
    def locate(state, t, count):
        # 5. row block, panel, tile within the block
        state[_FIRST] = state[TASK] // (block_tiles * panels) * block_tiles
        state[_IN_BLOCK] = T.min(count - state[_FIRST], T.int64(block_tiles))
        state[_WITHIN] = state[TASK] - state[_FIRST] * panels
        state[NEXT_PANEL] = state[_WITHIN] // state[_IN_BLOCK]
        state[_WITHIN] = state[_WITHIN] - state[NEXT_PANEL] * state[_IN_BLOCK]
        state[NEXT_UNIT] = (state[_FIRST] + state[_WITHIN]) * units
        # 3. the last tile has the rows that are left
        state[NEXT_ROWS] = T.min(t - state[NEXT_UNIT], T.int64(units)) * rows
        # 5. each tile of a block prefetches its share of the next panel; a single one runs ahead of itself
        state[LINES] = (step_lines + state[_IN_BLOCK] - 1) // state[_IN_BLOCK]
        if state[_IN_BLOCK] == 1:
            state[AHEAD] = T.int64(lone_bytes // 4)
        else:
            state[AHEAD] = (
                cut.product.steps * WIDTH + state[_WITHIN] * cut.whole_steps * state[LINES] * CACHE_LINE_FLOATS
            )

    return locate
