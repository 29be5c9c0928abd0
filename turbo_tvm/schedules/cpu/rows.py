"""How rows are stored, and copies between storages: flat rows to row tiles and back, fp32 to bf16.

Activations are `(tiles, row_tile, width)`: a row may be wider than its columns, and holds fp32 or the bits of bf16. The
copies take one pass over the data, in parallel over rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.script import CACHE_LINE_BYTES
from turbo_tvm.schedules.cpu.tiles import CpuTiles


@dataclass(frozen=True)
class RowFormat:
    """width: columns of the buffer, of which the first are used; dtype: "float32", or "uint16" for bf16."""

    width: int
    dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return tvm.DataType(self.dtype).itemsize

    @property
    def line(self) -> int:
        """Columns in a cache line."""
        return CACHE_LINE_BYTES // self.itemsize


def tile_rows(tiles: CpuTiles, *, columns: int) -> tirx.PrimFunc:
    """x (rows, columns) f32 -> out (t, R, columns) f32 with t = ceil(rows / R); surplus rows are zero."""
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


def cast_rows(tiles: CpuTiles, *, columns: int, out: RowFormat | None = None) -> tirx.PrimFunc:
    """x (t, R, columns) f32 -> out (t, R, width) bf16."""
    R, lanes = tiles.row_tile, tiles.lanes
    out_rows = out or RowFormat(columns, bf16.STORAGE)
    whole = columns // lanes * lanes

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        x = T.match_buffer(x_arg, (t, R, columns), "float32")
        result = T.match_buffer(out_arg, (t, R, out_rows.width), out_rows.dtype)
        for row in T.parallel(t * R):
            for block in range(columns // lanes):
                for lane in T.vectorized(lanes):
                    result[row // R, row % R, block * lanes + lane] = bf16.from_float(
                        x[row // R, row % R, block * lanes + lane]
                    )
            for rest in range(columns - whole):
                result[row // R, row % R, whole + rest] = bf16.from_float(x[row // R, row % R, whole + rest])

    return kernel
