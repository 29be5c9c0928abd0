"""Step 2 of the strategy of `linear.py`: which tile of the output a task computes, and which weights it prefetches.

Tasks are numbered block of rows, panel, tile within the block. What a task works out about itself lies in a small int64
buffer, its place: as nested `T.let`s the same arithmetic keeps TVM's simplifier busy for minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro

# What a place holds.
PANEL = 0  # the tile's panel of the weight
UNIT = 1  # its first row tile
MISSING = 2  # how many row tiles fewer than a whole register tile it has
IN_BLOCK = 3  # tiles of its block
_AHEAD = 4  # the first row, of all panels, that it prefetches
_RATE = 5  # rows that a group of steps prefetches, as a fraction of fixed point
_TILE = 6  # its number in the batch
_WITHIN = 7  # its number within what was divided last
_BLOCK = 8  # its block, of those of the same size
_WHOLE = 9  # tiles of the batch that have all their row tiles
PLACES = 10

_FRACTION_BITS = 16


@dataclass(frozen=True)
class Tasks:
    """What the numbering depends on."""

    units: int  # row tiles of a register tile
    panels: int  # of the weight
    steps: int  # rows of a panel
    columns: int  # of a panel
    group: int  # steps that prefetch together
    ahead: int  # by how many elements a tile that is alone with its panel prefetches ahead


def next_row(place: tvm.tirx.Buffer, group: Expr) -> Expr:
    """Return which row of all panels, one after another, a group of steps of the task prefetches first."""
    return place[_AHEAD] + T.shift_right(group * place[_RATE], T.int64(_FRACTION_BITS))


def locate_macro(tasks: Tasks) -> Macro:
    """`locate(place, task, t, count, blocks)` fills in the place of a task.

    t: row tiles of the batch, in `count` register tiles and `blocks` blocks of them, sizes as equal as can be.
    """
    units, panels, steps, columns = tasks.units, tasks.panels, tasks.steps, tasks.columns
    group, ahead = tasks.group, tasks.ahead

    @T.inline
    def find_block(place, task, count, blocks):
        # 2. row block, panel, tile within the block; the first `large` blocks have one tile more than the others
        large = T.meta_var(count % blocks)
        small_size = T.meta_var(count // blocks)
        if task < large * (small_size + 1) * panels:
            place[IN_BLOCK] = small_size + 1
            place[_TILE] = 0
        else:
            place[IN_BLOCK] = small_size
            place[_TILE] = large * (small_size + 1)
        place[_WITHIN] = task - place[_TILE] * panels
        place[_BLOCK] = place[_WITHIN] // (place[IN_BLOCK] * panels)
        place[_WITHIN] = place[_WITHIN] - place[_BLOCK] * (place[IN_BLOCK] * panels)
        place[PANEL] = place[_WITHIN] // place[IN_BLOCK]
        place[_WITHIN] = place[_WITHIN] - place[PANEL] * place[IN_BLOCK]
        place[_TILE] = place[_TILE] + place[_BLOCK] * place[IN_BLOCK] + place[_WITHIN]

    @T.inline
    def find_rows(place, t, count):
        # 1. tiles differ by one row tile at most: the last ones are one row tile short; a single one may be two short
        place[_WHOLE] = T.max(count - (count * units - t), 0)
        place[UNIT] = place[_TILE] * units - T.max(place[_TILE] - place[_WHOLE], 0)
        place[MISSING] = T.if_then_else(
            place[_TILE] < place[_WHOLE], T.int64(0), T.if_then_else(count == 1, count * units - t, T.int64(1))
        )

    @T.inline
    def plan_prefetch(place):
        # 3. each tile of a block prefetches its share of the next panel; a single one runs ahead of itself
        place[_RATE] = T.int64(group << _FRACTION_BITS) // place[IN_BLOCK]
        if place[IN_BLOCK] == 1:
            place[_AHEAD] = place[PANEL] * steps + ahead // columns
        else:
            place[_AHEAD] = (place[PANEL] + 1) * steps + T.shift_right(
                place[_WITHIN] * (steps // group) * place[_RATE], T.int64(_FRACTION_BITS)
            )

    @T.inline
    def locate(place, task, t, count, blocks):
        find_block(place, task, count, blocks)
        find_rows(place, t, count)
        plan_prefetch(place)

    return locate
