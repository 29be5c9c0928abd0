"""Row normalisation on the CPU: layer norm, with or without a residual, and L2 norm. fp32 throughout.

Layout: activations `(t, R, n)`, R = `tiles.row_tile`, t symbolic; `gamma`, `beta`: `(n,)`. Any n.

Strategy
1. One task per row, all rows in one parallel loop: a row is a few KB, so its sweeps after the first read L1.
2. A sweep walks the row in groups of `_CHAINS` vectors, each with an accumulator of its own, so that additions do
   not wait for each other; then the vectors left over, then the scalars (n % lanes).
3. Layer norm is the corrected two-pass algorithm: sum -> mean; then the sum and the sum of squares of x - mean,
   of which the first repairs the rounding of the mean; then the result. E[x^2] - E[x]^2 in one pass was rejected:
   with |mean| >> std it cancels to noise.
4. The residual is added again in each sweep: two loads from L1 cost less than a store and a load of their sum.

Method: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.script import tree_sum, without_parameters
from turbo_tvm.schedules.tiles import CpuTiles

_CHAINS = 4

Row = Callable[[Expr], Expr]
Macro = Callable[..., None]


def row_of(tile: Expr, row: Expr, x: tvm.tirx.Buffer, residual: tvm.tirx.Buffer | None = None) -> Row:
    """Column index -> element of that row of `x`, plus the residual's if there is one."""
    if residual is None:
        return lambda column: x[tile, row, column]
    return lambda column: x[tile, row, column] + residual[tile, row, column]


def _lane_sum(partial: tvm.tirx.Buffer) -> Expr:
    chains, lanes = (int(extent) for extent in partial.shape)
    return tree_sum([tree_sum([partial[chain, lane] for chain in range(chains)]) for lane in range(lanes)])


def _row_sum(lanes: int, n: int) -> Macro:
    """`row_sum(partial, element)` leaves the sum of element(0 .. n - 1) spread over `partial[_CHAINS, lanes]`."""
    group = _CHAINS * lanes
    grouped, vectors = n // group * group, n // lanes * lanes

    @T.inline
    def row_sum(partial, element):
        for chain in T.unroll(_CHAINS):
            for lane in T.vectorized(lanes):
                partial[chain, lane] = T.float32(0)
        for block in range(n // group):
            for chain in T.unroll(_CHAINS):
                for lane in T.vectorized(lanes):
                    partial[chain, lane] = partial[chain, lane] + element(
                        block * group + chain * lanes + lane
                    )
        for chain in T.unroll((vectors - grouped) // lanes):
            for lane in T.vectorized(lanes):
                partial[chain, lane] = partial[chain, lane] + element(grouped + chain * lanes + lane)
        for tail in range(n - vectors):
            partial[0, 0] = partial[0, 0] + element(vectors + tail)

    return row_sum


def _row_store(lanes: int, n: int) -> Macro:
    """`row_store(out, tile, row, element)` writes element(0 .. n - 1) to that row of `out`."""
    vectors = n // lanes * lanes

    @T.inline
    def row_store(out, tile, row, element):
        for block in range(n // lanes):
            for lane in T.vectorized(lanes):
                out[tile, row, block * lanes + lane] = element(block * lanes + lane)
        for tail in range(n - vectors):
            out[tile, row, vectors + tail] = element(vectors + tail)

    return row_store


def _centred(x: Row, mean: tvm.tirx.Buffer) -> Row:
    return lambda column: x(column) - mean[0]


def _squared(x: Row) -> Row:
    return lambda column: x(column) * x(column)


def _scaled(x: Row, factor: tvm.tirx.Buffer) -> Row:
    return lambda column: x(column) * factor[0]


def _affine(x: Row, moments: tvm.tirx.Buffer, gamma: tvm.tirx.Buffer, beta: tvm.tirx.Buffer) -> Row:
    return lambda column: (x(column) - moments[1]) * moments[2] * gamma[column] + beta[column]


def normalize_row(lanes: int, n: int, eps: float) -> Macro:
    """`normalize(out, tile, row, x, gamma, beta)`: layer norm of the row `x`, which may be that of `out` itself.

    The two divisions by n are exact where every element is equal: a constant row gives beta to the last bit.
    """
    row_sum, row_store = _row_sum(lanes, n), _row_store(lanes, n)

    @T.inline
    def normalize(out, tile, row, x, gamma, beta):
        with T.sblock("normalize"):
            T.reads()
            T.writes()
            partial = T.sblock_alloc_buffer((_CHAINS, lanes), "float32", scope="local")
            # the mean, what rounding it left of it, 1 / the standard deviation
            moments = T.sblock_alloc_buffer((3,), "float32", scope="local")
            row_sum(partial, x)
            moments[0] = _lane_sum(partial) / T.float32(n)
            row_sum(partial, _centred(x, moments))
            moments[1] = _lane_sum(partial) / T.float32(n)
            row_sum(partial, _squared(_centred(x, moments)))
            moments[2] = _lane_sum(partial) / T.float32(n) - moments[1] * moments[1]
            moments[2] = T.float32(1) / T.sqrt(T.max(moments[2], T.float32(0)) + T.float32(eps))
            row_store(out, tile, row, _affine(_centred(x, moments), moments, gamma, beta))

    return normalize


def layer_norm(tiles: CpuTiles, *, n: int, eps: float, residual: bool = False) -> tvm.tirx.PrimFunc:
    """`(x, [residual,] gamma, beta, out)`: out = (v - mean v) / sqrt(var v + eps) * gamma + beta, v = x [+ residual].

    x, residual, out: fp32 `(t, R, n)`. gamma, beta: fp32 `(n,)`. The variance divides by n.
    """
    rows = tiles.row_tile
    normalize = normalize_row(tiles.lanes, n, eps)

    def row_source(tile: Expr, row: Expr, x: tvm.tirx.Buffer, extra: tvm.tirx.Buffer) -> Row:
        return row_of(tile, row, x, extra if residual else None)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        residual_arg: T.handle,
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        x = T.match_buffer(x_arg, (t, rows, n), "float32")
        residual_in = T.match_buffer(residual_arg, (t, rows, n), "float32")
        out = T.match_buffer(out_arg, (t, rows, n), "float32")
        for task in T.parallel(t * rows):
            normalize(
                out,
                task // rows,
                task % rows,
                row_source(task // rows, task % rows, x, residual_in),
                gamma,
                beta,
            )

    return kernel if residual else without_parameters(kernel, ["residual_in"])


def l2_normalize(tiles: CpuTiles, *, n: int, eps: float = 1e-12) -> tvm.tirx.PrimFunc:
    """`(x, out)`: each row of x over max(its Euclidean length, eps). fp32 `(t, R, n)` both."""
    rows, lanes = tiles.row_tile, tiles.lanes
    row_sum, row_store = _row_sum(lanes, n), _row_store(lanes, n)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        x = T.match_buffer(x_arg, (t, rows, n), "float32")
        out = T.match_buffer(out_arg, (t, rows, n), "float32")
        for task in T.parallel(t * rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                partial = T.sblock_alloc_buffer((_CHAINS, lanes), "float32", scope="local")
                inverse = T.sblock_alloc_buffer((1,), "float32", scope="local")
                row_sum(partial, _squared(row_of(task // rows, task % rows, x)))
                inverse[0] = T.float32(1) / T.max(T.sqrt(_lane_sum(partial)), T.float32(eps))
                row_store(
                    out, task // rows, task % rows, _scaled(row_of(task // rows, task % rows, x), inverse)
                )

    return kernel
