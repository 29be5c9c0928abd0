"""Row normalisation on the CPU: layer norm and RMS norm, with or without a residual, and L2 norm. fp32 arithmetic.

Layout: activations `(t, R, n)` or wider, fp32 or bf16 (`bf16.py`), R = `tiles.row_tile`, t symbolic; `gamma`,
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

The steps are in `normalization_rows.py`.

Method: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7;
Zhang, Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import L2Normalize, Norm, Operator
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu.normalization_rows import CHAINS, l2_normalize_macro, normalize_all_macro
from turbo_tvm.schedules.cpu.script import CPU_LLVM, without_parameters
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernels: a tuner's log of another one says nothing about them


def space(_operator: Operator, tiles: CpuTiles) -> Space:
    """Return the decision of both kernels, and of whoever normalises rows as they do."""
    return Space((Knob("chains", (2, 4, 8), CHAINS, "vectors that are summed at once, in an accumulator each"),))


def norm(operator: Norm, tiles: CpuTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(x, [residual,] gamma, [beta,] out)`: v = x + residual, normalised.

    Layer norm is (v - mean v) / sqrt(var v + eps) * gamma + beta, where the variance divides by n; RMS norm, without
    beta, v / sqrt(mean v^2 + eps) * gamma. gamma, beta: fp32 `(n,)`. variants: settings of `space` by rows.
    """
    rows, n, eps = tiles.row_tile, operator.columns_out, operator.eps
    kind, residual = "rms" if operator.is_rms else "layer", operator.residual is not None
    x_rows, extra_rows, out_rows = operator.x, operator.residual or Operand.rows(n), operator.out

    def body(setting: dict[str, int]) -> Macro:
        normalize_all = normalize_all_macro(tiles.lanes, n, eps, kind, **setting)

        @T.inline
        def run(t, operands):
            normalize_all(*operands)

        return run

    run = by_rows(variants, space(operator, tiles), rows, body)

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


def l2_normalize(operator: L2Normalize, tiles: CpuTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(x, out)`: each row of x over max(its Euclidean length, eps). variants: settings of `space` by rows."""
    rows, n, eps, choices = tiles.row_tile, operator.columns_out, operator.eps, space(operator, tiles)
    x_rows, out_rows = operator.x, operator.out
    run = by_rows(variants, choices, rows, lambda setting: l2_normalize_macro(tiles.lanes, n, eps, **setting))

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
