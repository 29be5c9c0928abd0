"""Copies of rows between storages on a GPU: fp32 to fp16 or bf16."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import CastRows
from turbo_tvm.schedules.common.space import Knob, Space, Variant
from turbo_tvm.schedules.cuda.numbers import from_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(_operator: CastRows, _tiles: CudaTiles) -> Space:
    """Return the decision of this kernel."""
    return Space((Knob("threads", (64, 128, 256, 512), 256, "threads of a block"),))


def cast_rows(operator: CastRows, tiles: CudaTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, out)`: x fp32 `(m, 1, columns)`, out `(m, 1, width)` in fp16 or bf16.

    variants: one setting of `space` at most.
    """
    threads, columns, out = only_setting(variants, space(operator, tiles))["threads"], operator.x.width, operator.out
    vector = min(4, vector_width(columns, out))
    per_row = columns // vector

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr(kernel_attrs(max(1, threads // per_row)))
        m = T.int32()
        x = T.match_buffer(x_arg, (m, 1, columns), "float32")
        result = T.match_buffer(out_arg, (m, 1, out.width), out.dtype)
        for block in T.thread_binding((m * per_row + threads - 1) // threads, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("piece"):
                    T.reads()
                    T.writes()
                    held = T.sblock_alloc_buffer((vector,), "float32", scope="local")
                    raw = T.sblock_alloc_buffer((vector,), out.dtype, scope="local")
                    piece: T.let = block * threads + thread
                    if piece < m * per_row:
                        for j in T.vectorized(vector):
                            held[j] = x[piece // per_row, 0, piece % per_row * vector + j]
                        for j in T.unroll(vector):
                            raw[j] = from_float(held[j], out.dtype)
                        for j in T.vectorized(vector):
                            result[piece // per_row, 0, piece % per_row * vector + j] = raw[j]

    return kernel
