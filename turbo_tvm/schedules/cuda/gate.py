"""Gated linear unit on a GPU: one half of a row, activated, times the other.

Layout: x and out `(m, 1, width)`, fp32, fp16 or bf16; m symbolic. fp32 arithmetic. A thread makes one access of the
output from one access of each half.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Gate, formats
from turbo_tvm.schedules.common.space import Knob, Space, Variant
from turbo_tvm.schedules.common.vector_math import activation as activation_by_name
from turbo_tvm.schedules.cuda.numbers import from_float, to_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(_operator: Gate, _tiles: CudaTiles) -> Space:
    """Return the decision of this kernel."""
    return Space((Knob("threads", (64, 128, 256, 512), 256, "threads of a block"),))


def gate(operator: Gate, tiles: CudaTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, out)`: out[:, i] = activation(x[:, i]) * x[:, columns + i] for i < columns.

    Where `second` is set, the activation is the second half's. variants: one setting of `space` at most.
    """
    threads, columns = only_setting(variants, space(operator, tiles))["threads"], operator.columns
    x_rows, out_rows = operator.x, operator.out
    activate = activation_by_name(operator.activation, formats.of_storage(out_rows.dtype))
    vector = vector_width(columns, x_rows, out_rows)
    per_row = columns // vector
    active, linear = (columns, 0) if operator.second else (0, columns)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr(kernel_attrs(max(1, threads // per_row)))
        m = T.int32()
        source = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        for block in T.thread_binding((m * per_row + threads - 1) // threads, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("piece"):
                    T.reads()
                    T.writes()
                    held = T.sblock_alloc_buffer((2, vector), x_rows.dtype, scope="local")
                    raw = T.sblock_alloc_buffer((vector,), out_rows.dtype, scope="local")
                    piece: T.let = block * threads + thread
                    if piece < m * per_row:
                        for j in T.vectorized(vector):
                            held[0, j] = source[piece // per_row, 0, active + piece % per_row * vector + j]
                        for j in T.vectorized(vector):
                            held[1, j] = source[piece // per_row, 0, linear + piece % per_row * vector + j]
                        for j in T.unroll(vector):
                            raw[j] = from_float(
                                activate(to_float(held[0, j], x_rows.dtype)) * to_float(held[1, j], x_rows.dtype),
                                out_rows.dtype,
                            )
                        for j in T.vectorized(vector):
                            result[piece // per_row, 0, piece % per_row * vector + j] = raw[j]

    return kernel
