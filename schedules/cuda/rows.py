"""Copies of rows between storages on a GPU: fp32 to fp16 or bf16."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.numbers import from_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs
from turbo_tvm.schedules.rows import RowFormat

_THREADS = 256


def cast_rows(*, columns: int, out: RowFormat) -> tvm.tirx.PrimFunc:
    """x (m, 1, columns) f32 -> out (m, 1, width) in fp16 or bf16."""
    vector = min(4, vector_width(columns, out))
    per_row = columns // vector

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr(kernel_attrs(max(1, _THREADS // per_row)))
        m = T.int32()
        x = T.match_buffer(x_arg, (m, 1, columns), "float32")
        result = T.match_buffer(out_arg, (m, 1, out.width), out.dtype)
        for block in T.thread_binding((m * per_row + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("piece"):
                    T.reads()
                    T.writes()
                    held = T.sblock_alloc_buffer((vector,), "float32", scope="local")
                    raw = T.sblock_alloc_buffer((vector,), out.dtype, scope="local")
                    piece: T.let = block * _THREADS + thread
                    if piece < m * per_row:
                        for j in T.vectorized(vector):
                            held[j] = x[piece // per_row, 0, piece % per_row * vector + j]
                        for j in T.unroll(vector):
                            raw[j] = from_float(held[j], out.dtype)
                        for j in T.vectorized(vector):
                            result[piece // per_row, 0, piece % per_row * vector + j] = raw[j]

    return kernel
