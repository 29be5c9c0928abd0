"""Gated activation on a GPU: `schedules/gate.py`, a thread per access of the output."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.numbers import BF16_STORAGE, from_float, to_float
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.common.space import Knob, Space, Variant
from turbo_tvm.schedules.cpu.vector_math import activation as activation_by_name

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(**_options: object) -> Space:
    """The decision of this kernel."""
    return Space((Knob("threads", (64, 128, 256, 512), 256, "threads of a block"),))


def gate(
    *,
    columns: int,
    activation: str,
    second: bool = False,
    x: RowFormat | None = None,
    out: RowFormat | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, out)`: out[:, i] = activation(x[:, i]) * x[:, columns + i] for i < columns; rows `(m, 1, width)`.

    second: the activation is the second half's. x, out: how they are stored, by default fp32, as wide as their columns.
    variants: one setting of `space` at most.
    """
    threads = only_setting(variants, space())["threads"]
    x_rows, out_rows = x or RowFormat(2 * columns), out or RowFormat(columns)
    stored = "uint16" if out_rows.dtype == BF16_STORAGE else "float32"
    activate = activation_by_name(activation, stored)
    vector = vector_width(columns, x_rows, out_rows)
    per_row = columns // vector
    active, linear = (columns, 0) if second else (0, columns)

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
