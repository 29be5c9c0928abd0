"""Steps 1 and 4 of the strategy of `linear.py`: a register tile of the output, from the bias to the stored rows."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.linear_blocking import Blocking, Half, Tile
from turbo_tvm.schedules.cpu.linear_prefetch import prefetch_group_macro, prefetch_step_macro


def compute_tile_macro(cut: Blocking) -> Macro:
    """`compute_tile(height, place, operands)`: a register tile of so many rows, from the bias to the output."""
    columns = cut.columns
    accumulate, finish = _accumulate_macro(cut), _finish_macro(cut)

    @T.inline
    def start(half):
        for r in T.unroll(half.height):
            for c in T.vectorized(columns):
                half.acc[r, c] = half.tile.operands.bias[half.tile.panel * columns + c]

    @T.inline
    def compute_tile(height, place, operands):
        with T.sblock("tile"):
            T.reads()
            T.writes()
            upper = T.sblock_alloc_buffer((height // 2, columns), "float32")
            lower = T.sblock_alloc_buffer((height // 2, columns), "float32")
            tile = T.meta_var(Tile(height, place, operands))
            halves = T.meta_var((Half(upper, tile, 0), Half(lower, tile, height // 2)))
            # 4. the bias, as what the accumulators start with
            start(halves[0])
            start(halves[1])
            # 1. one pass over k
            accumulate(tile, *halves)
            # 4. activation and residual, on the tile in registers
            finish(tile, *halves)

    return compute_tile


def _accumulate_macro(cut: Blocking) -> Macro:
    """`accumulate(tile, upper, lower)`: the products of step 1, and the prefetches of step 3 along the way."""
    steps, group_steps = cut.product.steps, cut.group
    step = _bf16_step(cut) if cut.product.in_bf16 else _fp32_step(cut)
    prefetch_group, prefetch_step = prefetch_group_macro(cut), prefetch_step_macro(cut)

    @T.inline
    def accumulate(tile, upper, lower):
        for group in range(steps // group_steps):
            # 3. ask for weights and rows that come later
            prefetch_group(tile, group)
            for i in T.unroll(group_steps):
                prefetch_step(tile, group, i)
                # 1. both halves of the tile, a step of k
                step(upper, group * group_steps + i)
                step(lower, group * group_steps + i)
        for i in range(steps % group_steps):
            step(upper, steps // group_steps * group_steps + i)
            step(lower, steps // group_steps * group_steps + i)

    return accumulate


def _fp32_step(cut: Blocking) -> Macro:
    """`step(half, i)`: acc += column i of x times row i of the panel."""
    rows, columns = cut.rows, cut.columns

    @T.inline
    def step(half, i):
        acc = T.meta_var(half.acc)
        operands = T.meta_var(half.tile.operands)
        for r in T.unroll(half.height):
            for c in T.vectorized(columns):
                acc[r, c] = acc[r, c] + operands.x[half.index(rows, r, i)] * operands.weight[half.tile.panel, i, c]

    return step


def _bf16_step(cut: Blocking) -> Macro:
    """`step(half, i)`: the same for pair i of the columns of x and of the rows of the panel."""
    rows, columns, lanes = cut.rows, cut.columns, cut.tiles.lanes

    @T.inline
    def step(half, i):
        with T.sblock("pairs"):
            T.reads()
            T.writes()
            x = T.meta_var(half.tile.operands.x)
            pairs = T.decl_buffer((x.shape[0], rows, x.shape[2] // 2), bf16.PAIR, data=x.data)
            for r in T.unroll(half.height):
                for v in T.unroll(columns // lanes):
                    half.acc[r, T.ramp(v * lanes, 1, lanes)] = bf16.dot(
                        half.acc[r, T.ramp(v * lanes, 1, lanes)],
                        T.broadcast(pairs[half.index(rows, r, i)], lanes),
                        half.tile.operands.weight[half.tile.panel, i, T.ramp(v * lanes, 1, lanes)],
                    )

    return step


def _finish_macro(cut: Blocking) -> Macro:
    """`finish(tile, upper, lower)`: step 4, activation and residual, and the way into the output."""
    product, rows, columns, tail_columns = cut.product, cut.rows, cut.columns, cut.tail_columns
    whole_panels, activate = product.n // columns, product.activate

    def with_residual(half: Half, value: Expr, r: Expr, column: Expr) -> Expr:
        return product.add_residual(value, half.tile.operands.extra, *half.index(rows, r, column))

    @T.inline
    def store(half):
        out = T.meta_var(half.tile.operands.out)
        for r in T.unroll(half.height):
            for c in T.vectorized(columns):
                column = T.meta_var(half.tile.panel * columns + c)
                out[half.index(rows, r, column)] = bf16.stored(
                    out, with_residual(half, activate(half.acc[r, c]), r, column)
                )

    @T.inline
    def store_tail(half):
        out = T.meta_var(half.tile.operands.out)
        for r in range(half.height):
            for c in T.vectorized(columns):
                half.acc[r, c] = activate(half.acc[r, c])
            for c in range(tail_columns):
                column = T.meta_var(whole_panels * columns + c)
                out[half.index(rows, r, column)] = bf16.stored(out, with_residual(half, half.acc[r, c], r, column))

    @T.inline
    def finish(tile, upper, lower):
        if tail_columns > 0:
            if tile.panel < whole_panels:
                store(upper)
                store(lower)
            else:
                store_tail(upper)
                store_tail(lower)
        else:
            store(upper)
            store(lower)

    return finish
