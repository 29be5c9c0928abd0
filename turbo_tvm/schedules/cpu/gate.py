"""Gated activation on the CPU: of two halves of a row, one times the activation of the other. fp32 arithmetic.

Layout: activations `(t, R, width)`, fp32 or bf16, R = `tiles.row_tile`, t symbolic. A task is a row, which it reads and
writes once, in vectors. The halves are the two projections of a gated feed-forward, whose weights lie side by side, so
that one product makes both; a gate in that product's kernel would need them interleaved.

Method: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cpu.vector_math import activation as activation_by_name


def gate(
    tiles: CpuTiles,
    *,
    columns: int,
    activation: str,
    second: bool = False,
    x: RowFormat | None = None,
    out: RowFormat | None = None,
) -> tvm.tirx.PrimFunc:
    """`(x, out)`: out[:, i] = activation(x[:, i]) * x[:, columns + i] for i < columns.

    second: the activation is the second half's. x, out: how they are stored, by default fp32 `(t, R, 2 * columns)` and
    `(t, R, columns)`.
    """
    rows, lanes = tiles.row_tile, tiles.lanes
    x_rows, out_rows = x or RowFormat(2 * columns), out or RowFormat(columns)
    activate = activation_by_name(activation, out_rows.dtype)
    active, linear = (columns, 0) if second else (0, columns)
    whole = columns // lanes * lanes

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, x_rows.width), x_rows.dtype)
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        for row in T.parallel(t * rows):
            for block in range(columns // lanes):
                for lane in T.vectorized(lanes):
                    result[row // rows, row % rows, block * lanes + lane] = bf16.stored(
                        result,
                        activate(bf16.load(source, row // rows, row % rows, active + block * lanes + lane))
                        * bf16.load(source, row // rows, row % rows, linear + block * lanes + lane),
                    )
            for rest in range(columns - whole):
                result[row // rows, row % rows, whole + rest] = bf16.stored(
                    result,
                    activate(bf16.load(source, row // rows, row % rows, active + whole + rest))
                    * bf16.load(source, row // rows, row % rows, linear + whole + rest),
                )

    return kernel
