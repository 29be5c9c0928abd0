"""Transpose a square of vectors in registers."""

from __future__ import annotations

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Shuffle

from turbo_tvm.schedules.common.space import Macro


def transpose_macro(lanes: int) -> Macro:
    """`transpose(a, b)` transposes the block `(lanes, lanes)` in `a`, by exchanges at distance lanes / 2 ... 1.

    The result is in `b` when log2(lanes) is odd, else in `a`.
    """

    def mix(a: tvm.tirx.Buffer, row: Expr, distance: int, upper: bool) -> Expr:
        """Return the lower or the upper half of each pair of blocks of rows `row` and `row + distance`."""
        pick = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        if upper:
            pick = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        return Shuffle([a[row, T.ramp(0, 1, lanes)], a[row + distance, T.ramp(0, 1, lanes)]], pick)

    @T.inline
    def exchange(a, b, distance, again):
        for i in T.unroll(lanes // 2):
            row = T.meta_var(i // distance * distance * 2 + i % distance)
            b[row, T.ramp(0, 1, lanes)] = mix(a, row, distance, False)
            b[row + distance, T.ramp(0, 1, lanes)] = mix(a, row, distance, True)
        if distance > 1:
            again(b, a, distance // 2, again)

    @T.inline
    def transpose(a, b):
        exchange(a, b, lanes // 2, exchange)

    return transpose
