"""Sweeps over a row, and the norms that are made of them: the steps of the strategy of `normalization.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.script import lane_sum, tree_sum

CHAINS = 4  # vectors of a sweep that are summed at once, unless a setting says else

Row = Callable[[Expr], Expr]  # column index -> element


def row_of(tile: Expr, row: Expr, x: tvm.tirx.Buffer, residual: tvm.tirx.Buffer | None = None) -> Row:
    """Return column index -> element of that row of `x`, plus the residual's if there is one."""
    if residual is None:
        return lambda column: bf16.load(x, tile, row, column)
    return lambda column: bf16.load(x, tile, row, column) + bf16.load(residual, tile, row, column)


def normalize_row_macro(lanes: int, n: int, eps: float, chains: int = CHAINS) -> Macro:
    """`normalize(out, tile, row, x, gamma, beta)`: layer norm of the row `x`, be it that of `out` itself.

    Every division by n is exact in a row of equal elements, which therefore gives beta to the last bit.
    """
    row_sums, row_store = _row_sums_macro(lanes, n, chains), _row_store_macro(lanes, n)

    @T.inline
    def normalize(out, tile, row, x, gamma, beta):
        with T.sblock("normalize"):
            T.reads()
            T.writes()
            # 5. small "global" buffers, which lie on the stack
            partial = T.sblock_alloc_buffer((chains, lanes), "float32")
            squares = T.sblock_alloc_buffer((chains, lanes), "float32")
            # 3. the sum, hence the mean
            row_sums((partial,), (x,))
            mean: T.let = _lane_sum(partial) / T.float32(n)
            # 3. the sums of x - mean and of its squares; the former repairs the rounding of the mean
            row_sums((partial, squares), (_centred(x, mean), _squared(_centred(x, mean))))
            drift: T.let = _lane_sum(partial) / T.float32(n)
            variance: T.let = T.max(_lane_sum(squares) / T.float32(n) - drift * drift, T.float32(0))
            scale: T.let = T.float32(1) / T.sqrt(variance + T.float32(eps))
            # 3. the result
            row_store(out, tile, row, _affine(_scaled(_centred(_centred(x, mean), drift), scale), gamma, beta))

    return normalize


def _rms_normalize_row_macro(lanes: int, n: int, eps: float, chains: int = CHAINS) -> Macro:
    """`normalize(out, tile, row, x, gamma, beta)`: the same as RMS norm; beta is not looked at."""
    row_sums, row_store = _row_sums_macro(lanes, n, chains), _row_store_macro(lanes, n)

    @T.inline
    def normalize(out, tile, row, x, gamma, beta):
        with T.sblock("normalize"):
            T.reads()
            T.writes()
            squares = T.sblock_alloc_buffer((chains, lanes), "float32")
            # 3. the sum of squares, which does not cancel
            row_sums((squares,), (_squared(x),))
            scale: T.let = T.float32(1) / T.sqrt(_lane_sum(squares) / T.float32(n) + T.float32(eps))
            # 3. the result
            row_store(out, tile, row, _gained(_scaled(x, scale), gamma))

    return normalize


def normalize_all_macro(lanes: int, n: int, eps: float, kind: str = "layer", chains: int = CHAINS) -> Macro:
    """`normalize_all(x, residual, out, gamma, beta)`: layer norm, or RMS norm, of all rows of x [+ residual]."""
    normalize = {"layer": normalize_row_macro, "rms": _rms_normalize_row_macro}[kind](lanes, n, eps, chains)

    @T.inline
    def normalize_all(x, residual, out, gamma, beta):
        # 1. a task per row
        for task in T.parallel(out.shape[0] * out.shape[1]):
            tile: T.let = task // out.shape[1]
            row: T.let = task % out.shape[1]
            # 4. the residual is added anew in each sweep
            normalize(out, tile, row, row_of(tile, row, x, residual), gamma, beta)

    return normalize_all


def l2_normalize_macro(lanes: int, n: int, eps: float, chains: int) -> Macro:
    """`run(t, operands)`: every row of x over its length; operands: (x, out)."""
    row_sums, row_store = _row_sums_macro(lanes, n, chains), _row_store_macro(lanes, n)

    @T.inline
    def normalize_all(t, rows, source, result):
        # 1. a task per row
        for task in T.parallel(t * rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                partial = T.sblock_alloc_buffer((chains, lanes), "float32")
                tile: T.let = task // rows
                row: T.let = task % rows
                # 2. the sum of squares, then the result
                row_sums((partial,), (_squared(row_of(tile, row, source)),))
                length: T.let = T.sqrt(_lane_sum(partial))
                inverse: T.let = T.float32(1) / T.max(length, T.float32(eps))
                row_store(result, tile, row, _scaled(row_of(tile, row, source), inverse))

    @T.inline
    def run(t, operands):
        normalize_all(t, operands[1].shape[1], *operands)

    return run


def _row_sums_macro(lanes: int, n: int, chains: int) -> Macro:
    """`row_sums(partials, elements)` leaves the sum of each element(0 .. n - 1) spread over its `partial`."""
    group = chains * lanes
    grouped, vectors = n // group * group, n // lanes * lanes
    clear = _clear_macro(lanes, chains)

    @T.inline
    def row_sums(partials, elements):
        clear(0, clear, partials)
        # 2. groups of vectors, each with an accumulator of its own
        for block in range(n // group):
            for chain in T.unroll(chains):
                for lane in T.vectorized(lanes):
                    _add(partials, elements, (chain, lane), block * group + chain * lanes + lane)
        # 2. the vectors left over
        for chain in T.unroll((vectors - grouped) // lanes):
            for lane in T.vectorized(lanes):
                _add(partials, elements, (chain, lane), grouped + chain * lanes + lane)
        # 2. the scalars left over
        for tail in range(n - vectors):
            _add(partials, elements, (0, 0), vectors + tail)

    return row_sums


def _add(
    partials: Sequence[tvm.tirx.Buffer], elements: Sequence[Row], where: tuple[Expr | int, Expr | int], column: Expr
) -> None:
    """Add the element of a column to an accumulator of each partial sum."""
    for partial, element in zip(partials, elements, strict=True):
        T.buffer_store(partial, partial[where] + element(column), list(where))


def _clear_macro(lanes: int, chains: int) -> Macro:
    """`clear(0, clear, partials)`: zeros into all partial sums."""

    @T.inline
    def clear(i, again, partials):
        for chain in T.unroll(chains):
            for lane in T.vectorized(lanes):
                partials[i][chain, lane] = T.float32(0)
        if i + 1 < len(partials):
            again(i + 1, again, partials)

    return clear


def _row_store_macro(lanes: int, n: int) -> Macro:
    """`row_store(out, tile, row, element)` writes element(0 .. n - 1) to that row of `out`."""
    vectors = n // lanes * lanes

    @T.inline
    def row_store(out, tile, row, element):
        for block in range(n // lanes):
            for lane in T.vectorized(lanes):
                out[tile, row, block * lanes + lane] = bf16.stored(out, element(block * lanes + lane))
        for tail in range(n - vectors):
            out[tile, row, vectors + tail] = bf16.stored(out, element(vectors + tail))

    return row_store


def _lane_sum(partial: tvm.tirx.Buffer) -> Expr:
    """Return the sum of all elements of partial sums: chains first, then lanes."""
    chains, lanes = (int(extent) for extent in partial.shape)
    return lane_sum(tree_sum([partial[chain, T.ramp(0, 1, lanes)] for chain in range(chains)]), lanes)


def _centred(x: Row, mean: Expr) -> Row:
    return lambda column: x(column) - mean


def _squared(x: Row) -> Row:
    return lambda column: x(column) * x(column)


def _scaled(x: Row, factor: Expr) -> Row:
    return lambda column: x(column) * factor


def _gained(x: Row, gamma: tvm.tirx.Buffer) -> Row:
    return lambda column: x(column) * gamma[column]


def _affine(x: Row, gamma: tvm.tirx.Buffer, beta: tvm.tirx.Buffer) -> Row:
    return lambda column: x(column) * gamma[column] + beta[column]
