"""The matrix kernel on a GPU: `activation(x @ W + bias) + residual` in one call.

Shapes: x `(m, 1, k)` or wider, weight `(P, k, C)`, bias fp32 `(P * C,)`, residual and out `(m, 1, n)` or wider. m is
symbolic; C = `tiles.col_tile`, P = `tiles.panels(n)`. A panel is C columns of W, one row of them per k; the last panel
and the bias are padded with zeros. x and the weight are both fp32, both fp16 or both bf16 (`uint16` bits), residual and
out any of these. Everything is accumulated in fp32. Any m, k and n.

Strategy
1. A block computes a tile of the output, BM rows by one panel. Blocks that share rows are neighbours: x stays in L2.
2. Tiles of x and of W pass through shared memory, BK of k at a time, in two buffers: while the warps multiply one, each
   thread holds its part of the next in registers, on its way from memory. One barrier per BK. Rows in shared memory are
   padded so that the accesses of a warp fall into different banks.
3. fp16 and bf16 multiply in tensor cores (`products.py`), 16 x 16 x 16 at a time, a warp 32 rows by half a panel. fp32
   multiplies in registers, 8 x 8 per thread. How many rows, how much of k and by which warps are knobs.
4. The accumulators pass through shared memory once more, so that each thread gets neighbours in a row: bias, activation
   and residual apply there, in fp32, and rows are stored in 128-bit accesses.

x is read past its end nowhere: rows beyond m repeat the last one and are not stored; columns beyond k are zeros.

Method: tiling after Kerr et al., "CUTLASS: Fast Linear Algebra in CUDA C++" (2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda import products
from turbo_tvm.schedules.cuda.block_product import WARP, BlockProduct, block_product
from turbo_tvm.schedules.cuda.numbers import BF16_STORAGE, from_float, to_float
from turbo_tvm.schedules.cuda.reduction import ACCESS_BYTES, vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting, operand_type, sync_block
from turbo_tvm.schedules.cuda.tiles import CudaTiles
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.common.space import Knob, Setting, Space, Variant
from turbo_tvm.schedules.cpu.vector_math import activation as activation_by_name

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

Macro = Callable[..., None]


def space(tiles: CudaTiles, *, k: int, x: RowFormat | None = None, **_options: object) -> Space:
    """The decisions of this kernel: what a block computes, and by which warps, as far as its resources go.

    Every thread then has as many whole accesses to the tiles as the others.
    """
    x_rows = x or RowFormat(k)
    usual = block_product(operand_type(x_rows.dtype), tiles.col_tile)
    depths = (16, 32, 64) if usual.tensor_cores else (8, 16, 32)

    def fits(setting: Setting) -> bool:
        return _block(usual, setting).fits(x_rows.itemsize, vector_width(k, x_rows))

    return Space(
        (
            Knob("rows", (32, 64, 128), usual.rows, "rows of the tile that a block computes"),
            Knob("depth", depths, usual.depth, "of k at a time in shared memory"),
            Knob("warps_down", (1, 2, 4), usual.warps[0], "warps that share the rows of a tile"),
            Knob("warps_across", (1, 2, 4), usual.warps[1], "warps that share its columns"),
        ),
        fits,
    )


def _block(usual: BlockProduct, setting: Setting) -> BlockProduct:
    """The geometry that a setting asks for."""
    warps = setting["warps_down"], setting["warps_across"]
    return replace(usual, rows=setting["rows"], depth=setting["depth"], warps=warps)


def linear(
    tiles: CudaTiles,
    *,
    k: int,
    n: int,
    activation: str | None = None,
    residual: bool = False,
    x: RowFormat | None = None,
    extra: RowFormat | None = None,
    out: RowFormat | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, weight, bias, [residual,] out)`: out = activation(x @ W + bias) [+ residual].

    x, extra, out: how x, the residual and out are stored, by default fp32 and k, n and n columns wide. variants: one
    setting of `space` at most.
    """
    x_rows, extra_rows, out_rows = x or RowFormat(k), extra or RowFormat(n), out or RowFormat(n)
    dtype = operand_type(x_rows.dtype)
    columns, panels = tiles.col_tile, tiles.panels(n)
    block = _block(block_product(dtype, columns), only_setting(variants, space(tiles, k=k, x=x)))
    threads, depth, height = block.threads, block.depth, block.rows
    steps = -(-k // depth)
    per_access = ACCESS_BYTES // x_rows.itemsize
    x_vector = vector_width(k, x_rows)
    x_pieces = height * depth // x_vector // threads
    w_pieces = depth * columns // per_access // threads
    activate = activation_by_name(activation, "uint16" if out_rows.dtype == BF16_STORAGE else "float32")
    out_vector = min(block.widest, vector_width(n, out_rows, *((extra_rows,) if residual else ())))
    whole_k = k % depth == 0
    clear, multiply = products.clear_macro(block), products.multiply_macro(block)
    finish = products.finish_macro(block, out_vector)

    @T.inline
    def load(x, weight, x_held, w_held, thread, first_row, panel, step, m):
        for i in T.unroll(x_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(T.min(first_row + piece // (depth // x_vector), m - 1))
            column = T.meta_var(step * depth + piece % (depth // x_vector) * x_vector)
            if whole_k:
                for j in T.vectorized(x_vector):
                    x_held[i * x_vector + j] = x[row, 0, column + j]
            else:
                if column < k:
                    for j in T.vectorized(x_vector):
                        x_held[i * x_vector + j] = x[row, 0, column + j]
                else:
                    for j in T.unroll(x_vector):
                        x_held[i * x_vector + j] = T.cast(T.float32(0), dtype)
        for i in T.unroll(w_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(step * depth + piece // (columns // per_access))
            column = T.meta_var(piece % (columns // per_access) * per_access)
            if whole_k:
                for j in T.vectorized(per_access):
                    w_held[i * per_access + j] = weight[panel, row, column + j]
            else:
                if row < k:
                    for j in T.vectorized(per_access):
                        w_held[i * per_access + j] = weight[panel, row, column + j]
                else:
                    for j in T.unroll(per_access):
                        w_held[i * per_access + j] = T.cast(T.float32(0), dtype)

    @T.inline
    def keep(x_held, w_held, x_tile, w_tile, thread, side):
        for i in T.unroll(x_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(piece // (depth // x_vector))
            column = T.meta_var(piece % (depth // x_vector) * x_vector)
            if block.transposed:
                for j in T.unroll(x_vector):
                    x_tile[side, column + j, row] = x_held[i * x_vector + j]
            else:
                for j in T.vectorized(x_vector):
                    x_tile[side, row, column + j] = x_held[i * x_vector + j]
        for i in T.unroll(w_pieces):
            piece = T.meta_var(i * threads + thread)
            row = T.meta_var(piece // (columns // per_access))
            column = T.meta_var(piece % (columns // per_access) * per_access)
            for j in T.vectorized(per_access):
                w_tile[side, row, column + j] = w_held[i * per_access + j]

    def place(values, bias, extra, out, panel, first_row, m) -> Macro:
        """What `finish` calls for `out_vector` values that are neighbours in a row of the tile."""

        @T.inline
        def store(row, place_in_panel):
            column = T.meta_var(panel * columns + place_in_panel)
            if first_row + row < m:  # noqa: SIM102  TVMScript knows no `and`
                if column < n:
                    with T.sblock("store"):
                        T.reads()
                        T.writes()
                        shift = T.sblock_alloc_buffer((out_vector,), "float32", scope="local")
                        raw = T.sblock_alloc_buffer((out_vector,), out_rows.dtype, scope="local")
                        for i in T.unroll(max(1, out_vector // 4)):
                            for j in T.vectorized(min(out_vector, 4)):
                                shift[i * 4 + j] = bias[column + i * 4 + j]
                        for j in T.unroll(out_vector):
                            values[j] = values[j] + shift[j]
                        for j in T.unroll(out_vector):
                            values[j] = activate(values[j])
                        if residual:
                            held = T.sblock_alloc_buffer((out_vector,), extra_rows.dtype, scope="local")
                            for j in T.vectorized(out_vector):
                                held[j] = extra[first_row + row, 0, column + j]
                            for j in T.unroll(out_vector):
                                values[j] = values[j] + to_float(held[j], extra_rows.dtype)
                        for j in T.unroll(out_vector):
                            raw[j] = from_float(values[j], out_rows.dtype)
                        for j in T.vectorized(out_vector):
                            out[first_row + row, 0, column + j] = raw[j]

        return store

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        weight_arg: T.handle,
        bias_arg: T.handle,
        residual_arg: T.handle,
        out_arg: T.handle,
    ):
        T.func_attr(kernel_attrs(height))
        m = T.int32()
        x_stored = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        w_stored = T.match_buffer(weight_arg, (panels, k, columns), x_rows.dtype)
        bias = T.match_buffer(bias_arg, (panels * columns,), "float32")
        residual_rows = T.match_buffer(residual_arg, (m, 1, extra_rows.width), extra_rows.dtype)
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        for row_block in T.thread_binding((m + height - 1) // height, thread="blockIdx.y"):
            for panel in T.thread_binding(panels, thread="blockIdx.x"):
                for warp in T.thread_binding(threads // WARP, thread="threadIdx.y"):
                    for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                        with T.sblock("tile"):
                            T.reads()
                            T.writes()
                            source = T.decl_buffer((m, 1, x_rows.width), dtype, data=x_stored.data)
                            weight = T.decl_buffer((panels, k, columns), dtype, data=w_stored.data)
                            x_tile = T.sblock_alloc_buffer(block.x_shape, dtype, scope="shared")
                            w_tile = T.sblock_alloc_buffer(block.w_shape, dtype, scope="shared")
                            stage = T.sblock_alloc_buffer(block.stage_shape, "float32", scope="shared")
                            x_held = T.sblock_alloc_buffer((x_pieces * x_vector,), dtype, scope="local")
                            w_held = T.sblock_alloc_buffer((w_pieces * per_access,), dtype, scope="local")
                            x_part = T.sblock_alloc_buffer(block.x_part, dtype, scope=block.x_scope)
                            w_part = T.sblock_alloc_buffer(block.w_part, dtype, scope=block.w_scope)
                            sums = T.sblock_alloc_buffer(block.sums, "float32", scope=block.sums_scope)
                            values = T.sblock_alloc_buffer((out_vector,), "float32", scope="local")
                            thread = T.meta_var(warp * WARP + lane)
                            clear(sums)
                            load(source, weight, x_held, w_held, thread, row_block * height, panel, 0, m)
                            keep(x_held, w_held, x_tile, w_tile, thread, 0)
                            sync_block()
                            for step in range(steps - 1):
                                load(source, weight, x_held, w_held, thread, row_block * height, panel, step + 1, m)
                                multiply(x_tile, w_tile, x_part, w_part, sums, warp, lane, step % 2)
                                keep(x_held, w_held, x_tile, w_tile, thread, (step + 1) % 2)
                                sync_block()
                            multiply(x_tile, w_tile, x_part, w_part, sums, warp, lane, (steps - 1) % 2)
                            finish(
                                sums,
                                stage,
                                values,
                                warp,
                                lane,
                                place(values, bias, residual_rows, result, panel, row_block * height, m),
                            )

    return kernel if residual else without_parameters(kernel, ["residual_rows"])
