"""Steps 1 to 4 of the strategy of `linear_amx.py` for one tile: its products, by tile instructions, into `acc`."""

from __future__ import annotations

from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import amx
from turbo_tvm.schedules.cpu.linear_amx_finish import finish_row_macro, finish_some_macro
from turbo_tvm.schedules.cpu.linear_amx_run import (
    AHEAD,
    LINES,
    NEXT_PANEL,
    NEXT_ROWS,
    NEXT_UNIT,
    ROWS,
    SHAPE,
    WIDTH,
    AmxBlocking,
)
from turbo_tvm.schedules.cpu.script import CACHE_LINE_FLOATS, prefetch_near, prefetch_read


def accumulate_macro(cut: AmxBlocking) -> Macro:
    """`accumulate(both, run)`: steps 1 to 4 for a tile with or without a lower half, into `acc`."""
    whole_steps, rest_pairs = cut.whole_steps, cut.rest_pairs
    clear, restore, save = _accumulators_macros()
    multiply_tiles, prefetch = _multiply_tiles_macro(cut), _prefetch_macro(cut)
    finish_row, finish_some = finish_row_macro(cut), finish_some_macro(cut)

    @T.inline
    def multiply_whole(both, run, upper, lower):
        rows = T.meta_var(run.state[NEXT_ROWS])
        # 3. configure the tiles anew where their rows change
        if run.state[SHAPE] != rows:
            amx.configure(run.shapes, upper, lower, amx.PAIRS)
            run.state[SHAPE] = rows
        clear(both)
        for i in range(whole_steps):
            # 5. weights of the next panel, or of later steps
            prefetch(run, i)
            # 1. four products
            multiply_tiles(both, run, i)
            # 2. beside them, rows of the tile before
            finish_some(run, i)
        save(both, run.acc)

    @T.inline
    def multiply_rest(both, run, upper, lower):
        # 4. what k leaves over: a step of smaller tiles
        amx.configure(run.shapes, upper, lower, rest_pairs)
        run.state[SHAPE] = 0
        if whole_steps > 0:
            restore(both, run.acc)
        else:
            clear(both)
        multiply_tiles(both, run, whole_steps)
        save(both, run.acc)

    @T.inline
    def accumulate(both, run):
        rows = T.meta_var(run.state[NEXT_ROWS])
        upper = T.meta_var(T.int64(amx.ROWS) if both else rows)
        lower = T.meta_var(rows - amx.ROWS if both else T.int64(0))
        if whole_steps > 0:
            multiply_whole(both, run, upper, lower)
        else:
            for r in range(run.state[ROWS]):
                finish_row(run, r)
        if rest_pairs > 0:
            multiply_rest(both, run, upper, lower)

    return accumulate


def _accumulators_macros() -> tuple[Macro, Macro, Macro]:
    """`clear(both)`, `restore(both, acc)`, `save(both, acc)`: the accumulators, with or without the lower ones."""

    @T.inline
    def clear(both):
        amx.zero(0)
        amx.zero(1)
        if both:
            amx.zero(2)
            amx.zero(3)

    @T.inline
    def restore(both, acc):
        amx.load(0, acc, 0, WIDTH)
        amx.load(1, acc, amx.PAIRS, WIDTH)
        if both:
            amx.load(2, acc, amx.ROWS * WIDTH, WIDTH)
            amx.load(3, acc, amx.ROWS * WIDTH + amx.PAIRS, WIDTH)

    @T.inline
    def save(both, acc):
        amx.store(0, acc, 0, WIDTH)
        amx.store(1, acc, amx.PAIRS, WIDTH)
        if both:
            amx.store(2, acc, amx.ROWS * WIDTH, WIDTH)
            amx.store(3, acc, amx.ROWS * WIDTH + amx.PAIRS, WIDTH)

    return clear, restore, save


def _multiply_tiles_macro(cut: AmxBlocking) -> Macro:
    """`multiply_tiles(both, run, i)`: step i of k: four products for four loads, or two for three."""
    rows, steps, width = cut.rows, cut.product.steps, cut.product.x.width

    @T.inline
    def multiply_tiles(both, run, i):
        x = T.meta_var(run.operands.x)
        weight = T.meta_var(run.operands.weight)
        row = T.meta_var(run.state[NEXT_UNIT] * rows)
        first = T.meta_var((run.state[NEXT_PANEL] * steps + i * amx.PAIRS) * WIDTH)
        amx.load(6, weight, first, WIDTH)
        amx.load(7, weight, first + amx.PAIRS, WIDTH)
        amx.load(4, x, row * width + i * (2 * amx.PAIRS), width)
        amx.dot(0, 4, 6)
        amx.dot(1, 4, 7)
        if both:
            amx.load(5, x, (row + amx.ROWS) * width + i * (2 * amx.PAIRS), width)
            amx.dot(2, 5, 6)
            amx.dot(3, 5, 7)

    return multiply_tiles


def _prefetch_macro(cut: AmxBlocking) -> Macro:
    """`prefetch(run, i)`: the weights that step i asks for: into L2, and `near` steps ahead into L1."""
    steps, near, step_lines = cut.product.steps, cut.setting["near"], cut.step_lines

    @T.inline
    def prefetch(run, i):
        weight = T.meta_var(run.operands.weight)
        panel = T.meta_var(run.state[NEXT_PANEL])
        for line in range(run.state[LINES]):
            prefetch_read(
                weight,
                (panel * steps * WIDTH + run.state[AHEAD]) + (i * run.state[LINES] + line) * CACHE_LINE_FLOATS,
            )
        if near > 0:
            for line in T.unroll(step_lines):
                prefetch_near(weight, (panel * steps + (i + near) * amx.PAIRS) * WIDTH + line * CACHE_LINE_FLOATS)

    return prefetch
