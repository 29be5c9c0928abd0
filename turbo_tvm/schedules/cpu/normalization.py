"""Row normalisation on the CPU: layer norm and RMS norm, with or without a residual, and L2 norm. fp32 arithmetic.

Layout: activations `(t, R, n)` or wider, fp32 or bf16 (`schedules/bf16.py`), R = `tiles.row_tile`, t symbolic; `gamma`,
`beta`: fp32 `(n,)`. Any n.

Strategy
1. One task per row, all rows in one parallel loop: a row is a few KB, its sweeps after the first read L1.
2. A sweep walks the row in groups of vectors (knob `chains`), each with an accumulator of its own, so that
   additions do not wait for each other; then the vectors left over, then the scalars (n % lanes).
3. Layer norm is the corrected two-pass algorithm: the sum, hence the mean; then the sums of x - mean, which
   repairs the rounding of the mean, and of its squares; the result. E[x^2] - E[x]^2 in one pass was rejected:
   with |mean| >> std it cancels to noise.
   RMS norm takes two sweeps: the sum of squares, which does not cancel; the result.
4. The residual is added anew in each sweep: two loads from L1 cost less than to store the sum and load it.
5. `partial` is a "global" buffer below 1 KB: TVM keeps no others on the stack, and a call to its workspace
   pool costs as much as half a row. Scalars are `T.let`, because a plain assignment allocates as well.

Method: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7;
Zhang, Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.script import CPU_LLVM, lane_sum, tree_sum, without_parameters
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernels: a tuner's log of another one says nothing about them

KINDS = ("layer", "rms")
CHAINS = 4  # vectors of a sweep that are summed at once, unless a setting says else

Row = Callable[[Expr], Expr]


def space(tiles: CpuTiles, **_options: object) -> Space:
    """The decision of both kernels, and of whoever normalises rows as they do."""
    return Space((Knob("chains", (2, 4, 8), CHAINS, "vectors that are summed at once, in an accumulator each"),))


def row_of(tile: Expr, row: Expr, x: tvm.tirx.Buffer, residual: tvm.tirx.Buffer | None = None) -> Row:
    """Column index -> element of that row of `x`, plus the residual's if there is one."""
    if residual is None:
        return lambda column: bf16.load(x, tile, row, column)
    return lambda column: bf16.load(x, tile, row, column) + bf16.load(residual, tile, row, column)


def _lane_sum(partial: tvm.tirx.Buffer) -> Expr:
    chains, lanes = (int(extent) for extent in partial.shape)
    return lane_sum(tree_sum([partial[chain, T.ramp(0, 1, lanes)] for chain in range(chains)]), lanes)


def _row_sums(lanes: int, n: int, chains: int) -> Macro:
    """`row_sums(partials, elements)` leaves the sum of each element(0 .. n - 1) spread over its `partial`."""
    group = chains * lanes
    grouped, vectors = n // group * group, n // lanes * lanes

    @T.inline
    def add_from(i, again, partials, elements, chain, lane, column):
        partials[i][chain, lane] = partials[i][chain, lane] + elements[i](column)
        if i + 1 < len(partials):
            again(i + 1, again, partials, elements, chain, lane, column)

    @T.inline
    def add(partials, elements, chain, lane, column):
        add_from(0, add_from, partials, elements, chain, lane, column)

    @T.inline
    def clear_from(i, again, partials):
        for chain in T.unroll(chains):
            for lane in T.vectorized(lanes):
                partials[i][chain, lane] = T.float32(0)
        if i + 1 < len(partials):
            again(i + 1, again, partials)

    @T.inline
    def row_sums(partials, elements):
        clear_from(0, clear_from, partials)
        for block in range(n // group):
            for chain in T.unroll(chains):
                for lane in T.vectorized(lanes):
                    add(partials, elements, chain, lane, block * group + chain * lanes + lane)
        for chain in T.unroll((vectors - grouped) // lanes):
            for lane in T.vectorized(lanes):
                add(partials, elements, chain, lane, grouped + chain * lanes + lane)
        for tail in range(n - vectors):
            add(partials, elements, 0, 0, vectors + tail)

    return row_sums


def _row_store(lanes: int, n: int) -> Macro:
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


def normalize_row(lanes: int, n: int, eps: float, chains: int = CHAINS) -> Macro:
    """`normalize(out, tile, row, x, gamma, beta)`: layer norm of the row `x`, be it that of `out` itself.

    Every division by n is exact in a row of equal elements, which therefore gives beta to the last bit.
    """
    row_sums, row_store = _row_sums(lanes, n, chains), _row_store(lanes, n)

    @T.inline
    def normalize(out, tile, row, x, gamma, beta):
        with T.sblock("normalize"):
            T.reads()
            T.writes()
            partial = T.sblock_alloc_buffer((chains, lanes), "float32")
            squares = T.sblock_alloc_buffer((chains, lanes), "float32")
            row_sums((partial,), (x,))
            mean: T.let = _lane_sum(partial) / T.float32(n)
            row_sums((partial, squares), (_centred(x, mean), _squared(_centred(x, mean))))
            drift: T.let = _lane_sum(partial) / T.float32(n)
            variance: T.let = T.max(_lane_sum(squares) / T.float32(n) - drift * drift, T.float32(0))
            scale: T.let = T.float32(1) / T.sqrt(variance + T.float32(eps))
            row_store(out, tile, row, _affine(_scaled(_centred(_centred(x, mean), drift), scale), gamma, beta))

    return normalize


def _rms_normalize_row(lanes: int, n: int, eps: float, chains: int = CHAINS) -> Macro:
    """The same as RMS norm; beta is not looked at."""
    row_sums, row_store = _row_sums(lanes, n, chains), _row_store(lanes, n)

    @T.inline
    def normalize(out, tile, row, x, gamma, beta):
        with T.sblock("normalize"):
            T.reads()
            T.writes()
            squares = T.sblock_alloc_buffer((chains, lanes), "float32")
            row_sums((squares,), (_squared(x),))
            scale: T.let = T.float32(1) / T.sqrt(_lane_sum(squares) / T.float32(n) + T.float32(eps))
            row_store(out, tile, row, _gained(_scaled(x, scale), gamma))

    return normalize


def normalize_all_macro(lanes: int, n: int, eps: float, kind: str = "layer", chains: int = CHAINS) -> Macro:
    """`normalize_all(x, residual, out, gamma, beta)`: layer norm, or RMS norm, of all rows of x [+ residual]."""
    normalize = {"layer": normalize_row, "rms": _rms_normalize_row}[kind](lanes, n, eps, chains)

    @T.inline
    def normalize_all(x, residual, out, gamma, beta):
        for task in T.parallel(out.shape[0] * out.shape[1]):
            tile: T.let = task // out.shape[1]
            row: T.let = task % out.shape[1]
            normalize(out, tile, row, row_of(tile, row, x, residual), gamma, beta)

    return normalize_all


def norm(
    tiles: CpuTiles,
    *,
    n: int,
    eps: float,
    kind: str = "layer",
    residual: bool = False,
    x: RowFormat | None = None,
    extra: RowFormat | None = None,
    out: RowFormat | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, [residual,] gamma, [beta,] out)`: v = x + residual, normalised.

    kind: "layer", (v - mean v) / sqrt(var v + eps) * gamma + beta, where the variance divides by n; or "rms",
    v / sqrt(mean v^2 + eps) * gamma, without beta. x, extra, out: how x, the residual and out are stored, by default
    fp32 `(t, R, n)`. gamma, beta: fp32 `(n,)`. variants: settings of `space` by rows.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown norm {kind!r}: use one of {', '.join(KINDS)}")
    rows = tiles.row_tile
    x_rows, extra_rows, out_rows = (rows_format or RowFormat(n) for rows_format in (x, extra, out))

    def body(setting: dict[str, int]) -> Macro:
        normalize_all = normalize_all_macro(tiles.lanes, n, eps, kind, **setting)

        @T.inline
        def run(t, operands):
            normalize_all(*operands)

        return run

    run = by_rows(variants, space(tiles), rows, body)

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
        source = T.match_buffer(x_arg, (t, rows, x_rows.width), x_rows.dtype)
        residual_rows = T.match_buffer(residual_arg, (t, rows, extra_rows.width), extra_rows.dtype)
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", CPU_LLVM):
            operands = T.meta_var((source, residual_rows if residual else None, result, gamma, beta))
            run(t, operands)

    absent = [*([] if residual else ["residual_rows"]), *([] if kind == "layer" else ["beta"])]
    return without_parameters(kernel, absent)


def _l2_normalize_macro(lanes: int, n: int, eps: float, chains: int) -> Macro:
    """`run(t, operands)`: every row of x over its length; operands: (x, out)."""
    row_sums, row_store = _row_sums(lanes, n, chains), _row_store(lanes, n)

    @T.inline
    def normalize_all(t, rows, source, result):
        for task in T.parallel(t * rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                partial = T.sblock_alloc_buffer((chains, lanes), "float32")
                tile: T.let = task // rows
                row: T.let = task % rows
                row_sums((partial,), (_squared(row_of(tile, row, source)),))
                length: T.let = T.sqrt(_lane_sum(partial))
                inverse: T.let = T.float32(1) / T.max(length, T.float32(eps))
                row_store(result, tile, row, _scaled(row_of(tile, row, source), inverse))

    @T.inline
    def run(t, operands):
        normalize_all(t, operands[1].shape[1], *operands)

    return run


def l2_normalize(
    tiles: CpuTiles,
    *,
    n: int,
    eps: float = 1e-12,
    x: RowFormat | None = None,
    out: RowFormat | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, out)`: each row of x over max(its Euclidean length, eps). Both fp32 `(t, R, n)` unless x, out say else.

    variants: settings of `space` by rows.
    """
    rows = tiles.row_tile
    x_rows, out_rows = x or RowFormat(n), out or RowFormat(n)
    run = by_rows(variants, space(tiles), rows, lambda setting: _l2_normalize_macro(tiles.lanes, n, eps, **setting))

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, x_rows.width), x_rows.dtype)
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", CPU_LLVM):
            operands = T.meta_var((source, result))
            run(t, operands)

    return kernel
