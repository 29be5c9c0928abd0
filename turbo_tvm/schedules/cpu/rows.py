"""Copies of rows between storages: flat rows to row tiles and back, fp32 to bf16.

Activations are `(tiles, row_tile, width)`: a row may be wider than its columns, and holds fp32 or the bits of bf16. The
copies take one pass over the data, and

1. a task is a row;
2. it is copied column by column, or in vectors where its numbers are converted.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T

from turbo_tvm.ops import CastRows, TileRows, UntileRows
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.tiles import CpuTiles


def tile_rows(operator: TileRows, tiles: CpuTiles, _variants: Sequence[Variant] = ()) -> tirx.PrimFunc:
    """Return `(x, out)`: x (rows, columns) f32 -> out (t, R, columns) f32, t = ceil(rows / R); the rest is zero."""
    columns = operator.columns_out
    R = tiles.row_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        t = T.int64()
        X = T.match_buffer(x, (rows, columns), "float32")
        Out = T.match_buffer(out, (t, R, columns), "float32")
        # 1. a task is a row
        for row in T.parallel(t * R):
            # 2. its columns
            for column in T.serial(columns):
                with T.sblock("copy"):
                    T.reads(X[T.min(row, rows - 1), column])
                    T.writes(Out[row // R, row % R, column])
                    Out[row // R, row % R, column] = T.if_then_else(
                        row < rows, X[T.min(row, rows - 1), column], T.float32(0)
                    )

    return kernel


def untile_rows(operator: UntileRows, tiles: CpuTiles, _variants: Sequence[Variant] = ()) -> tirx.PrimFunc:
    """Return `(x, out)`: x (t, R, columns) f32 -> out (rows, columns) f32, which drops the surplus rows."""
    columns = operator.columns_out
    R = tiles.row_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        t = T.int64()
        X = T.match_buffer(x, (t, R, columns), "float32")
        Out = T.match_buffer(out, (rows, columns), "float32")
        # 1. a task is a row
        for row in T.parallel(rows):
            # 2. its columns
            for column in T.serial(columns):
                with T.sblock("copy"):
                    T.reads(X[row // R, row % R, column])
                    T.writes(Out[row, column])
                    Out[row, column] = X[row // R, row % R, column]

    return kernel


def cast_rows(operator: CastRows, tiles: CpuTiles, _variants: Sequence[Variant] = ()) -> tirx.PrimFunc:
    """Return `(x, out)`: x (t, R, columns) f32 -> out (t, R, width) bf16."""
    R, lanes, columns, out_rows = tiles.row_tile, tiles.lanes, operator.x.width, operator.out
    whole = columns // lanes * lanes

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        x = T.match_buffer(x_arg, (t, R, columns), "float32")
        result = T.match_buffer(out_arg, (t, R, out_rows.width), out_rows.dtype)
        # 1. a task is a row
        for row in T.parallel(t * R):
            # 2. vectors, then what is left over
            for block in range(columns // lanes):
                for lane in T.vectorized(lanes):
                    result[row // R, row % R, block * lanes + lane] = bf16.from_float(
                        x[row // R, row % R, block * lanes + lane]
                    )
            for rest in range(columns - whole):
                result[row // R, row % R, whole + rest] = bf16.from_float(x[row // R, row % R, whole + rest])

    return kernel
