"""Weights in the kernels' layout: packed for products, tables in 16 bits. Each runs once, when a model is compiled.

All run on the CPU that compiles, whatever the target: they take the target's tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import CastWeight, PackBias, PackWeight
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cuda.tiles import CudaTiles

Tiles = CpuTiles | CudaTiles

_PACK_ROWS = 16


def _stored(value: Expr, dtype: str) -> Expr:
    """Return an fp32 value as an element of that dtype, be it that of bf16."""
    return bf16.from_float(value) if dtype == bf16.STORAGE else T.cast(value, dtype)


def pack_weight(operator: PackWeight, tiles: Tiles, _variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(w, packed)`: fp32 `(n, k)`, PyTorch's layout, to `(P, k, C)` with zeros for the columns beyond n.

    In pairs along k it is int32 `(P, k / 2, C)` of bf16; k is even.

    1. A task is a panel and `_PACK_ROWS` of its rows.
    2. The block is read along the rows of w, a cache line each, and the lines that it scatters to all fit L1.
    """
    columns, panels, n, k = tiles.col_tile, tiles.panels(operator.n), operator.n, operator.k
    pairs, dtype = operator.in_pairs, operator.out.dtype
    step = 2 if pairs else 1
    if k % step:
        raise ValueError(f"k = {k}: pairs need an even number of columns")
    steps = k // step
    blocks = -(-steps // _PACK_ROWS)

    def element(w: tvm.tirx.Buffer, column: Expr, i: Expr) -> Expr:
        """Return an element of the packed weight."""
        return bf16.pair(w[column, 2 * i], w[column, 2 * i + 1]) if pairs else _stored(w[column, i], dtype)

    def zero() -> Expr:
        """Return what columns beyond n hold."""
        return T.cast(T.int32(0), dtype)

    @T.prim_func(private=True, s_tir=True)
    def kernel(w: T.Buffer((n, k), "float32"), packed: T.Buffer((panels, steps, columns), dtype)):
        T.func_attr({"tirx.noalias": True})
        # 1. a task is a panel and some of its rows
        for task in T.parallel(panels * blocks):
            panel: T.let = task // blocks
            first: T.let = (task % blocks) * _PACK_ROWS
            # 2. along the rows of w
            for c in range(columns):
                if panel * columns + c < n:
                    for i in range(T.min(_PACK_ROWS, steps - first)):
                        packed[panel, first + i, c] = element(w, panel * columns + c, first + i)
                else:
                    for i in range(T.min(_PACK_ROWS, steps - first)):
                        packed[panel, first + i, c] = zero()

    return kernel


def pack_bias(operator: PackBias, tiles: Tiles, _variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(bias, packed)`: fp32 `(n,)` to `(P * C,)`, padded with zeros."""
    n, padded = operator.n, tiles.panels(operator.n) * tiles.col_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(bias: T.Buffer((n,), "float32"), packed: T.Buffer((padded,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in range(n):
            packed[i] = bias[i]
        for i in range(padded - n):
            packed[n + i] = T.float32(0)

    return kernel


def cast_weight(operator: CastWeight, _tiles: Tiles, _variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(x, out)`: fp32 to the format of the result: tables of an embedding, gains of a norm."""
    shape, dtype = operator.weight.shape, operator.out.dtype
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
