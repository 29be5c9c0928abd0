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

from collections.abc import Sequence
from dataclasses import replace

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Linear
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Knob, Macro, Setting, Space, Variant
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.cuda import products
from turbo_tvm.schedules.cuda.block_product import WARP, BlockProduct, block_product
from turbo_tvm.schedules.cuda.linear_tiles import (
    Operands,
    Product,
    Tile,
    keep_tiles_macro,
    load_tiles_macro,
    store_macro,
)
from turbo_tvm.schedules.cuda.products import Memory, Thread
from turbo_tvm.schedules.cuda.reduction import vector_width
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting, operand_type, sync_block
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def refuses(operator: Linear, _tiles: CudaTiles) -> str:
    """Return why this kernel cannot do a product, "" if it can."""
    return "" if operator.norm_eps is None else "on a GPU a product's rows are normalised by a kernel of their own"


def space(operator: Linear, tiles: CudaTiles) -> Space:
    """Return the decisions of this kernel: what a block computes, and by which warps, as far as its resources go.

    Every thread then has as many whole accesses to the tiles as the others.
    """
    k, x_rows = operator.k, operator.x
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
    """Return the geometry that a setting asks for."""
    warps = setting["warps_down"], setting["warps_across"]
    return replace(usual, rows=setting["rows"], depth=setting["depth"], warps=warps)


def linear(operator: Linear, tiles: CudaTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, weight, bias, [residual,] out)`: out = activation(x @ W + bias) [+ residual].

    variants: one setting of `space` at most. Raises ValueError for what `refuses` refuses.
    """
    if reason := refuses(operator, tiles):
        raise ValueError(reason)
    k, n, residual = operator.k, operator.n, operator.residual
    x_rows, extra_rows, out_rows = operator.x, residual or Operand.rows(n), operator.out
    setting = only_setting(variants, space(operator, tiles))
    block = _block(block_product(operand_type(x_rows.dtype), tiles.col_tile), setting)
    product = Product(block, k, n, x_rows, residual, out_rows, operator.activation)
    run, dtype, panels, columns = _run_macro(product), product.dtype, tiles.panels(n), tiles.col_tile

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        weight_arg: T.handle,
        bias_arg: T.handle,
        residual_arg: T.handle,
        out_arg: T.handle,
    ):
        T.func_attr(kernel_attrs(block.rows))
        m = T.int32()
        x_stored = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        w_stored = T.match_buffer(weight_arg, (panels, k, columns), x_rows.dtype)
        bias = T.match_buffer(bias_arg, (panels * columns,), "float32")
        residual_rows = T.match_buffer(residual_arg, (m, 1, extra_rows.width), extra_rows.dtype)
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        # 1. a block for a tile of the output
        for row_block in T.thread_binding((m + block.rows - 1) // block.rows, thread="blockIdx.y"):
            for panel in T.thread_binding(panels, thread="blockIdx.x"):
                for warp in T.thread_binding(block.threads // WARP, thread="threadIdx.y"):
                    for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                        with T.sblock("tile"):
                            T.reads()
                            T.writes()
                            source = T.decl_buffer((m, 1, x_rows.width), dtype, data=x_stored.data)
                            weight = T.decl_buffer((panels, k, columns), dtype, data=w_stored.data)
                            operands = T.meta_var(Operands(source, weight, bias, residual_rows, result))
                            run(operands, Tile(row_block * block.rows, panel, m), Thread(warp, lane))

    return kernel if residual else without_parameters(kernel, ["residual_rows"])


def _run_macro(product: Product) -> Macro:
    """Return `run(operands, tile, thread)`: a block's tile of the output."""
    block, dtype, steps = product.block, product.dtype, product.steps
    clear, multiply = products.clear_macro(block), products.multiply_macro(block)
    load, keep = load_tiles_macro(product), keep_tiles_macro(product)
    finish = products.finish_macro(block, product.out_vector)

    @T.inline
    def run(operands, tile, thread):
        x_tile = T.sblock_alloc_buffer(block.x_shape, dtype, scope="shared")
        w_tile = T.sblock_alloc_buffer(block.w_shape, dtype, scope="shared")
        stage = T.sblock_alloc_buffer(block.stage_shape, "float32", scope="shared")
        x_held = T.sblock_alloc_buffer((product.x_pieces * product.x_vector,), dtype, scope="local")
        w_held = T.sblock_alloc_buffer((product.w_pieces * product.w_vector,), dtype, scope="local")
        x_part = T.sblock_alloc_buffer(block.x_part, dtype, scope=block.x_scope)
        w_part = T.sblock_alloc_buffer(block.w_part, dtype, scope=block.w_scope)
        sums = T.sblock_alloc_buffer(block.sums, "float32", scope=block.sums_scope)
        values = T.sblock_alloc_buffer((product.out_vector,), "float32", scope="local")
        memory = T.meta_var(Memory(x_tile, w_tile, stage, x_held, w_held, x_part, w_part, sums, values))
        clear(sums)
        load(memory, operands, tile, thread.number, 0)
        keep(memory, thread.number, 0)
        sync_block()
        # 2. while the warps multiply one pair of tiles, the next one is on its way; one barrier for each
        for step in range(steps - 1):
            load(memory, operands, tile, thread.number, step + 1)
            # 3. in tensor cores or in registers
            multiply(memory, thread, step % 2)
            keep(memory, thread.number, (step + 1) % 2)
            sync_block()
        multiply(memory, thread, (steps - 1) % 2)
        # 4. neighbours in a row for each thread
        finish(memory, thread, store_macro(product, memory, operands, tile))

    return run
