"""Which tile of the output a task of the matrix kernel computes, and which weights it prefetches: see `linear.py`.

Tasks are numbered block of rows, panel, tile within the block. What a task works out about itself lies in a small int64
buffer, its place: as nested `T.let`s the same arithmetic keeps TVM's simplifier busy for minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

Macro = Callable[..., None]

# What a place holds. PANEL: of the weights; UNIT: the tile's first row tile; MISSING: how many row tiles fewer than a
# whole register tile it has; IN_BLOCK: tiles in its block; the others lead there.
PANEL, UNIT, MISSING, IN_BLOCK, _AHEAD, _RATE, _TILE, _WITHIN, _BLOCK, _WHOLE = range(10)
PLACES = 10

_FRACTION_BITS = 16


def next_row(place: tvm.tirx.Buffer, group: Expr) -> Expr:
    """The first row of all panels, one after another, that a group of steps of the task prefetches."""
    return place[_AHEAD] + T.shift_right(group * place[_RATE], T.int64(_FRACTION_BITS))


def locate_macro(units: int, panels: int, steps: int, columns: int, group: int, ahead: int) -> Macro:
    """`locate(place, task, t, count, blocks)` fills in the place of a task.

    units: row tiles per register tile; steps: rows per panel; group: steps that prefetch together; ahead: by how many
    elements a tile that is alone with its panel. t: row tiles of the batch, in `count` register tiles and `blocks`
    blocks of them, sizes as equal as can be.
    """

    @T.inline
    def find_block(place, task, count, blocks):
        # the first `large` blocks have one tile more than the others
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
        # the last tiles are one row tile short; a single one may be two short
        place[_WHOLE] = T.max(count - (count * units - t), 0)
        place[UNIT] = place[_TILE] * units - T.max(place[_TILE] - place[_WHOLE], 0)
        place[MISSING] = T.if_then_else(
            place[_TILE] < place[_WHOLE], T.int64(0), T.if_then_else(count == 1, count * units - t, T.int64(1))
        )

    @T.inline
    def plan_prefetch(place):
        # each tile of a block prefetches its share of the next panel; a single one runs ahead of itself
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
