"""Steps 2 and 6 of the strategy of `linear_amx.py`: from the accumulators of a tile to rows of the output."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.linear_amx_run import PANEL, ROWS, UNIT, WIDTH, AmxBlocking, Run


def finish_row_macro(cut: AmxBlocking) -> Macro:
    """`finish_row(run, r)`: row r of the tile that waits in `acc` gets its epilogue and goes to the output."""
    rows, tail_columns, whole_panels = cut.rows, cut.tail_columns, cut.product.n // WIDTH
    store_whole = _store_packed_macro(cut) if cut.packs else _store_macro(cut)
    store_tail = _store_tail_macro(cut)

    @T.inline
    def finish_row(run, r):
        unit = T.meta_var(run.state[UNIT] + r // rows)
        row = T.meta_var(r % rows)
        # 6. of the last panel only columns that exist
        if tail_columns > 0:
            if run.state[PANEL] < whole_panels:
                store_whole(run, unit, row, r)
            else:
                store_tail(run, unit, row, r)
        else:
            store_whole(run, unit, row, r)

    return finish_row


def finish_some_macro(cut: AmxBlocking) -> Macro:
    """`finish_some(run, i)`: the rows of the tile before that step i finishes."""
    step_rows, finish_row = cut.step_rows, finish_row_macro(cut)

    @T.inline
    def finish_some(run, i):
        for r in range(T.min(i * step_rows, run.state[ROWS]), T.min((i + 1) * step_rows, run.state[ROWS])):
            finish_row(run, r)

    return finish_some


def _store_macro(cut: AmxBlocking) -> Macro:
    """`store(run, unit, row, r)`: step 2 for a row of a whole panel: bias, activation and residual."""
    product, activate = cut.product, cut.product.activate

    def finished(run: Run, index: tuple[Expr, Expr, Expr], value: Expr) -> Expr:
        """Return a value with all that follows the product."""
        activated = activate(value + run.operands.bias[index[2]])
        return product.add_residual(activated, run.operands.extra, *index)

    @T.inline
    def store(run, unit, row, r):
        out = T.meta_var(run.operands.out)
        for c in T.vectorized(WIDTH):
            index = T.meta_var((unit, row, run.state[PANEL] * WIDTH + c))
            out[index] = bf16.stored(out, finished(run, index, run.acc[r, c]))

    return store


def _store_packed_macro(cut: AmxBlocking) -> Macro:
    """`store_packed(run, unit, row, r)`: the same, 16 neighbours at once, by the CPU's conversion to bf16."""
    product, activate = cut.product, cut.product.activate

    def finished(run: Run, unit: Expr, row: Expr, r: Expr, column: Expr, v: Expr) -> Expr:
        """Return 16 neighbours of a row with all that follows the product."""
        ramp = T.ramp(column + v, 1, amx.PAIRS)
        value = activate(run.acc[r, T.ramp(v, 1, amx.PAIRS)] + run.operands.bias[ramp])
        return product.add_residual(value, run.operands.extra, unit, row, ramp)

    @T.inline
    def store_packed(run, unit, row, r):
        column = T.meta_var(run.state[PANEL] * WIDTH)
        for v in T.unroll(WIDTH // amx.PAIRS):
            run.operands.out[unit, row, T.ramp(column + v * amx.PAIRS, 1, amx.PAIRS)] = bf16.packed(
                finished(run, unit, row, r, column, v * amx.PAIRS)
            )

    return store_packed


def _store_tail_macro(cut: AmxBlocking) -> Macro:
    """`store_tail(run, unit, row, r)`: the same for those columns of the last panel that exist, one by one."""
    product, activate, first_column = cut.product, cut.product.activate, cut.product.n // WIDTH * WIDTH

    @T.inline
    def store_tail(run, unit, row, r):
        out = T.meta_var(run.operands.out)
        for c in T.vectorized(WIDTH):
            run.acc[r, c] = activate(run.acc[r, c] + run.operands.bias[first_column + c])
        for c in range(cut.tail_columns):
            index = T.meta_var((unit, row, first_column + c))
            out[index] = bf16.stored(out, product.add_residual(run.acc[r, c], run.operands.extra, *index))

    return store_tail
