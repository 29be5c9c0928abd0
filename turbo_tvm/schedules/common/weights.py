"""Weights in the kernels' layout: packed for products, tables in 16 bits. Each runs once, when a model is compiled.

All run on the CPU that compiles, whatever the target: they take the target's tiles.
"""

from __future__ import annotations

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cuda.tiles import CudaTiles
from turbo_tvm.schedules.cpu.tiles import CpuTiles

Tiles = CpuTiles | CudaTiles

_PACK_ROWS = 16


def _stored(value: Expr, dtype: str) -> Expr:
    """An fp32 value in that format, "uint16" for bf16."""
    return bf16.from_float(value) if dtype == bf16.STORAGE else T.cast(value, dtype)


def pack_weight(tiles: Tiles, *, k: int, n: int, pairs: bool = False, dtype: str = "float32") -> tvm.tirx.PrimFunc:
    """`(w, packed)`: fp32 `(n, k)`, PyTorch's layout, to `(P, k, C)` with zeros for the columns beyond n.

    dtype: of the packed weight. pairs: to bf16 pairs along k, int32 `(P, k / 2, C)`; k is even.

    One task per panel and `_PACK_ROWS` of its rows: the block is read along the rows of w, a cache line each, and the
    lines that it scatters to all fit L1.
    """
    columns, panels = tiles.col_tile, tiles.panels(n)
    step, dtype = (2, bf16.PAIR) if pairs else (1, dtype)
    if k % step:
        raise ValueError(f"k = {k}: pairs need an even number of columns")
    steps = k // step
    blocks = -(-steps // _PACK_ROWS)

    def element(w: tvm.tirx.Buffer, column: Expr, i: Expr) -> Expr:
        return bf16.pair(w[column, 2 * i], w[column, 2 * i + 1]) if pairs else _stored(w[column, i], dtype)

    def zero() -> Expr:
        return T.cast(T.int32(0), dtype)

    @T.prim_func(private=True, s_tir=True)
    def kernel(w: T.Buffer((n, k), "float32"), packed: T.Buffer((panels, steps, columns), dtype)):
        T.func_attr({"tirx.noalias": True})
        for task in T.parallel(panels * blocks):
            panel: T.let = task // blocks
            first: T.let = (task % blocks) * _PACK_ROWS
            for c in range(columns):
                if panel * columns + c < n:
                    for i in range(T.min(_PACK_ROWS, steps - first)):
                        packed[panel, first + i, c] = element(w, panel * columns + c, first + i)
                else:
                    for i in range(T.min(_PACK_ROWS, steps - first)):
                        packed[panel, first + i, c] = zero()

    return kernel


def pack_bias(tiles: Tiles, *, n: int) -> tvm.tirx.PrimFunc:
    """`(bias, packed)`: fp32 `(n,)` to `(P * C,)`, padded with zeros."""
    padded = tiles.panels(n) * tiles.col_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(bias: T.Buffer((n,), "float32"), packed: T.Buffer((padded,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in range(n):
            packed[i] = bias[i]
        for i in range(padded - n):
            packed[n + i] = T.float32(0)

    return kernel


def cast_weight(tiles: Tiles, *, shape: tuple[int, ...], dtype: str) -> tvm.tirx.PrimFunc:
    """`(x, out)`: fp32 of that shape to that dtype, "uint16" for bf16: the tables of an embedding, a norm's gains."""
    rows, columns = shape if len(shape) == 2 else (1, *shape)

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer(shape, "float32"), out: T.Buffer(shape, dtype)):
        T.func_attr({"tirx.noalias": True})
        for row in T.parallel(rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                source = T.decl_buffer((rows, columns), "float32", data=x.data)
                result = T.decl_buffer((rows, columns), dtype, data=out.data)
                for column in range(columns):
                    result[row, column] = _stored(source[row, column], dtype)

    return kernel
