"""Gated activation on the CPU: of two halves of a row, one times the activation of the other. fp32 arithmetic.

Layout: activations `(t, R, width)`, fp32 or bf16, R = `tiles.row_tile`, t symbolic.

Strategy
1. A task is a row.
2. It reads both halves and writes their product once, in vectors; then in scalars what is left over.

The halves are the two projections of a gated feed-forward, whose weights lie side by side, so
that one product makes both; a gate in that product's kernel would need them interleaved.

Method: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Gate, formats
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.common.vector_math import activation as activation_by_name
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.tiles import CpuTiles


def gate(operator: Gate, tiles: CpuTiles, _variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(x, out)`: out[:, i] = activation(x[:, i]) * x[:, columns + i] for i < columns.

    Where `second` is set, the activation is the second half's.
    """
    rows, lanes, columns = tiles.row_tile, tiles.lanes, operator.columns
    x_rows, out_rows = operator.x, operator.out
    activate = activation_by_name(operator.activation, formats.of_storage(out_rows.dtype))
    active, linear = (columns, 0) if operator.second else (0, columns)
    whole = columns // lanes * lanes

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, x_rows.width), x_rows.dtype)
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        # 1. a task is a row
        for row in T.parallel(t * rows):
            # 2. vectors, then what is left over
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
