"""Step 3 of the strategy of `linear.py`: what a tile of the matrix kernel asks for ahead of its use."""

from __future__ import annotations

from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu.linear_blocking import Blocking
from turbo_tvm.schedules.cpu.linear_tasks import IN_BLOCK, next_row
from turbo_tvm.schedules.cpu.script import CACHE_LINE_FLOATS, prefetch_near, prefetch_read


def prefetch_group_macro(cut: Blocking) -> Macro:
    """`prefetch_group(tile, group)`: step 3, what a group of steps asks for: weights, a line of residual and output."""
    rows, columns, lines, group_steps = cut.rows, cut.columns, cut.lines, cut.group
    product, touch_rows = cut.product, bool(cut.setting["touch_rows"])

    @T.inline
    def prefetch_rows(tile, buffer, layout, group):
        per_line = T.meta_var(min(layout.line, columns))
        if group < tile.height * (columns // per_line):
            prefetch_read(
                buffer,
                (tile.unit * rows + group // (columns // per_line)) * layout.width
                + tile.panel * columns
                + group % (columns // per_line) * per_line,
            )

    @T.inline
    def prefetch_group(tile, group):
        weight = T.meta_var(tile.operands.weight)
        for line in T.unroll(lines):
            prefetch_read(weight, next_row(tile.place, group) * columns + line * CACHE_LINE_FLOATS)
        if tile.place[IN_BLOCK] < group_steps:  # fewer tiles than steps: a row for each step
            for line in T.unroll((group_steps - 1) * lines):
                prefetch_read(weight, (next_row(tile.place, group) + 1) * columns + line * CACHE_LINE_FLOATS)
        if product.residual and touch_rows:
            prefetch_rows(tile, tile.operands.extra, product.extra, group)
        if touch_rows:
            prefetch_rows(tile, tile.operands.out, product.out, group)

    return prefetch_group


def prefetch_step_macro(cut: Blocking) -> Macro:
    """`prefetch_step(tile, group, i)`: weights into L1, `near` steps ahead of step i of a group."""
    steps, columns, lines, group_steps = cut.product.steps, cut.columns, cut.lines, cut.group
    near = cut.setting["near"]

    @T.inline
    def prefetch_step(tile, group, i):
        if near > 0:
            for line in T.unroll(lines):
                prefetch_near(
                    tile.operands.weight,
                    (tile.panel * steps + group * group_steps + i + near) * columns + line * CACHE_LINE_FLOATS,
                )

    return prefetch_step
