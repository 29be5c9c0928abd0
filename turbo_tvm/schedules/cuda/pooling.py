"""Pooling on a GPU: one row per sequence of a packed ragged batch, its first row or the mean of its rows.

Layout: x `(m, 1, hidden)` or wider, fp32, fp16 or bf16; out fp32 `(b, 1, hidden)`; m and b symbolic. `cu_seqlens`:
int32 `(b + 1,)`, ascending from 0: every sequence has a row. Any hidden.

Strategy
1. A block takes a strip of columns of one sequence, a lane some neighbouring columns.
2. For the mean its warps take turns with the rows.
3. The first warp adds up what they found, in a fixed order, and stores the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Pool
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant
from turbo_tvm.schedules.cpu.pooling import MODES
from turbo_tvm.schedules.cuda.block_product import WARP
from turbo_tvm.schedules.cuda.numbers import to_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting, sync_block
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(operator: Pool, _tiles: CudaTiles) -> Space:
    """Return the decision of this kernel; a first row is one warp's."""
    return Space(
        (Knob("warps", (2, 4, 8, 16), 8, "warps that share the rows of a sequence"),) if operator.mode == "mean" else ()
    )


def pool(operator: Pool, tiles: CudaTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, cu_seqlens, out)`: out row i = a row of sequence i, or the mean of its rows.

    A row that is not the first one must exist in every sequence. variants: one setting of `space` at most.
    """
    if operator.mode not in MODES:
        raise ValueError(f"unknown pooling mode {operator.mode!r}: use one of {', '.join(MODES)}")
    hidden, mode, row, x_rows = operator.columns_out, operator.mode, operator.row, operator.x
    vector = min(4, vector_width(hidden, x_rows))
    warps, strip = only_setting(variants, space(operator, tiles)).get("warps", 1), WARP * vector

    add_row = _add_row_macro(x_rows.dtype, vector)
    add_rows, share = _add_rows_macro(add_row, warps), _share_macro(vector, warps)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, cu_seqlens_arg: T.handle, out_arg: T.handle):
        T.func_attr(kernel_attrs(1))
        m = T.int32()
        bounds = T.int32()
        b = T.int32()
        source = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        cu_seqlens = T.match_buffer(cu_seqlens_arg, (bounds,), "int32")
        out = T.match_buffer(out_arg, (b, 1, hidden), "float32")
        # 1. a block for a sequence and a strip of columns
        for sequence in T.thread_binding(b, thread="blockIdx.y"):
            for block in T.thread_binding((hidden + strip - 1) // strip, thread="blockIdx.x"):
                for warp in T.thread_binding(warps, thread="threadIdx.y"):
                    for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                        with T.sblock("strip"):
                            T.reads()
                            T.writes()
                            sums = T.sblock_alloc_buffer((vector,), "float32", scope="local")
                            partials = T.sblock_alloc_buffer((warps, strip), "float32", scope="shared")
                            begin: T.let = cu_seqlens[sequence]
                            length: T.let = cu_seqlens[sequence + 1] - begin
                            column: T.let = block * strip + lane * vector
                            for j in T.unroll(vector):
                                sums[j] = T.float32(0)
                            if column < hidden:
                                if mode == "mean":
                                    add_rows(sums, source, begin, length, warp, column)
                                else:
                                    add_row(sums, source, begin + row, column)
                            if mode == "mean":
                                share(sums, partials, warp, lane, length)
                            if T.And(warp == 0, column < hidden):
                                for j in T.vectorized(vector):
                                    out[sequence, 0, column + j] = sums[j]

    return kernel


def _add_row_macro(dtype: str, vector: int) -> Macro:
    """Return `add_row(sums, source, row, column)`: add the lane's columns of a row, which is stored in that dtype."""

    @T.inline
    def add_row(sums, source, row, column):
        with T.sblock("row"):
            T.reads()
            T.writes()
            raw = T.sblock_alloc_buffer((vector,), dtype, scope="local")
            for j in T.vectorized(vector):
                raw[j] = source[row, 0, column + j]
            for j in T.unroll(vector):
                sums[j] = sums[j] + to_float(raw[j], dtype)

    return add_row


def _add_rows_macro(add_row: Macro, warps: int) -> Macro:
    """Return `add_rows(sums, source, begin, length, warp, column)`: add the rows of a sequence that are the warp's."""

    @T.inline
    def add_rows(sums, source, begin, length, warp, column):
        # 2. warps take turns with the rows
        for i in range((length - warp + warps - 1) // warps):
            add_row(sums, source, begin + i * warps + warp, column)

    return add_rows


def _share_macro(vector: int, warps: int) -> Macro:
    """Return `share(sums, partials, warp, lane, length)`: give the first warp the means; the others get zeros."""

    @T.inline
    def share(sums, partials, warp, lane, length):
        # 3. the first warp adds up what all have found
        for j in T.vectorized(vector):
            partials[warp, lane * vector + j] = sums[j]
        sync_block()
        for j in T.unroll(vector):
            sums[j] = T.float32(0)
        if warp == 0:
            for other in T.unroll(warps):
                for j in T.unroll(vector):
                    sums[j] = sums[j] + partials[other, lane * vector + j]
            for j in T.unroll(vector):
                sums[j] = sums[j] / T.cast(length, "float32")

    return share
