"""Compress a relative position bias into its table.

A bias that depends on j - i alone is a Toeplitz matrix per head: its first row and first column hold all of it.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from turbo_tvm.schedules.tiles import CpuTiles


def toeplitz(tiles: CpuTiles, *, heads: int, length: int) -> tirx.PrimFunc:
    """bias (1, heads, length, length) f32 -> table (heads, 2 * length - 1) f32.

    table[h, j - i + length - 1] = bias[0, h, i, j]; the tiles do not matter.
    """
    last = length - 1

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        bias: T.Buffer((1, heads, length, length), "float32"),
        table: T.Buffer((heads, 2 * last + 1), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for head, distance in T.grid(heads, 2 * last + 1):
            with T.sblock("copy"):
                h, d = T.axis.remap("SS", [head, distance])
                table[h, d] = bias[0, h, T.max(last - d, 0), T.max(d - last, 0)]

    return kernel
