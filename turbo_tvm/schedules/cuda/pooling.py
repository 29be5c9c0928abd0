"""Pooling on a GPU: one row per sequence of a packed ragged batch, its first row or the mean of its rows.

Layout: x `(m, 1, hidden)` or wider, fp32, fp16 or bf16; out fp32 `(b, 1, hidden)`; m and b symbolic. `cu_seqlens`:
int32 `(b + 1,)`, ascending from 0: every sequence has a row. Any hidden.

A block takes a strip of columns of one sequence, a lane some neighbouring columns. For the mean its warps take turns
with the rows, and the first warp adds up what they found, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.block_product import WARP
from turbo_tvm.schedules.cuda.numbers import to_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting, sync_block
from turbo_tvm.schedules.cpu.pooling import MODES
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.common.space import Knob, Space, Variant

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(*, mode: str, **_options: object) -> Space:
    """The decision of this kernel; a first row is one warp's."""
    return Space(
        (Knob("warps", (2, 4, 8, 16), 8, "warps that share the rows of a sequence"),) if mode == "mean" else ()
    )


def pool(
    *, hidden: int, mode: str, row: int = 0, x: RowFormat | None = None, variants: Sequence[Variant] = ()
) -> tvm.tirx.PrimFunc:
    """`(x, cu_seqlens, out)`: out row i = the first row of sequence i, or the mean of its rows.

    row: not the first one but that many after it; every sequence must have it. x: fp32 `(m, 1, hidden)` unless the
    format says else. variants: one setting of `space` at most.
    """
    if mode not in MODES:
        raise ValueError(f"unknown pooling mode {mode!r}: use one of {', '.join(MODES)}")
    x_rows = x or RowFormat(hidden)
    vector = min(4, vector_width(hidden, x_rows))
    warps, strip = only_setting(variants, space(mode=mode)).get("warps", 1), WARP * vector

    @T.inline
    def add_row(sums, source, row, column):
        with T.sblock("row"):
            T.reads()
            T.writes()
            raw = T.sblock_alloc_buffer((vector,), x_rows.dtype, scope="local")
            for j in T.vectorized(vector):
                raw[j] = source[row, 0, column + j]
            for j in T.unroll(vector):
                sums[j] = sums[j] + to_float(raw[j], x_rows.dtype)

    @T.inline
    def add_warps(sums, partials, lane):
        for other in T.unroll(warps):
            for j in T.unroll(vector):
                sums[j] = sums[j] + partials[other, lane * vector + j]

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, cu_seqlens_arg: T.handle, out_arg: T.handle):
        T.func_attr(kernel_attrs(1))
        m = T.int32()
        bounds = T.int32()
        b = T.int32()
        source = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        cu_seqlens = T.match_buffer(cu_seqlens_arg, (bounds,), "int32")
        out = T.match_buffer(out_arg, (b, 1, hidden), "float32")
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
                                    for i in range((length - warp + warps - 1) // warps):
                                        add_row(sums, source, begin + i * warps + warp, column)
                                else:
                                    add_row(sums, source, begin + row, column)
                            if mode == "mean":
                                for j in T.vectorized(vector):
                                    partials[warp, lane * vector + j] = sums[j]
                                sync_block()
                                for j in T.unroll(vector):
                                    sums[j] = T.float32(0)
                                if warp == 0:
                                    add_warps(sums, partials, lane)
                                    for j in T.unroll(vector):
                                        sums[j] = sums[j] / T.cast(length, "float32")
                            if T.And(warp == 0, column < hidden):
                                for j in T.vectorized(vector):
                                    out[sequence, 0, column + j] = sums[j]

    return kernel
