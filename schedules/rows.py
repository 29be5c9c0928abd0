"""Copies between flat rows `(rows, columns)` and row tiles `(tiles, row_tile, columns)`, for graphs that stay padded.

One pass over the data each way, in parallel over rows; surplus rows of the last tile are zero.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from turbo_tvm.schedules.tiles import CpuTiles


def tile_rows(tiles: CpuTiles, *, columns: int) -> tirx.PrimFunc:
    """x (rows, columns) f32 -> out (t, R, columns) f32 with t = ceil(rows / R)."""
    R = tiles.row_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        t = T.int64()
        X = T.match_buffer(x, (rows, columns), "float32")
        Out = T.match_buffer(out, (t, R, columns), "float32")
        for row in T.parallel(t * R):
            for column in T.serial(columns):
                with T.sblock("copy"):
                    T.reads(X[T.min(row, rows - 1), column])
                    T.writes(Out[row // R, row % R, column])
                    Out[row // R, row % R, column] = T.if_then_else(
                        row < rows, X[T.min(row, rows - 1), column], T.float32(0)
                    )

    return kernel


def untile_rows(tiles: CpuTiles, *, columns: int) -> tirx.PrimFunc:
    """x (t, R, columns) f32 -> out (rows, columns) f32, dropping the surplus rows."""
    R = tiles.row_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        t = T.int64()
        X = T.match_buffer(x, (t, R, columns), "float32")
        Out = T.match_buffer(out, (rows, columns), "float32")
        for row in T.parallel(rows):
            for column in T.serial(columns):
                with T.sblock("copy"):
                    T.reads(X[row // R, row % R, column])
                    T.writes(Out[row, column])
                    Out[row, column] = X[row // R, row % R, column]

    return kernel
