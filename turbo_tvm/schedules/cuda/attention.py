"""Attention of a packed ragged batch on a GPU: softmax(scale Q K^T [+ bias]) V, per sequence and head.

Layout: activations `(m, 1, width)`, fp32, fp16 or bf16; m symbolic. `query_tiles`: int32 `(nq, 3)`, rows (first_row,
seq_begin, seq_end): up to Q = `tiles.query_tile` queries from `first_row` on, fewer where the sequence ends, against
the keys [seq_begin, seq_end). Whoever makes them puts the long sequences first: blocks start in that order, so that the
last ones to finish are short.

Strategy
1. A block takes the queries of one task for one head, a warp 16 of them, two lanes a query. Keys and values pass
   through shared memory, some dozens at a time (knob `keys`), and no score ever reaches global memory.
2. Online softmax: a query keeps its running maximum, the sum that belongs to it and the weighted values; a larger
   maximum scales them down. Each lane sums on its own, the two meet once, at the end. The scale carries log2(e), so
   that a weight is one power of two.
3. fp16 and bf16 multiply in tensor cores (`attention_tensor_cores.py`), fp32 in registers (`attention_registers.py`).
4. With a window, a block visits the keys that some query of it sees, and scores at the rim weigh nothing.
5. Keys past the end of a sequence repeat the last one and weigh nothing; queries past it are not stored.

Method: FlashAttention (arXiv 2205.14135) on packed batches as in ByteTransformer (arXiv 2210.03052).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Attention
from turbo_tvm.schedules.common.space import Knob, Space, Variant
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.cuda import attention_registers, attention_tensor_cores
from turbo_tvm.schedules.cuda.attention_task import KEYS, HeadRows, Scores, Task
from turbo_tvm.schedules.cuda.block_product import WARP
from turbo_tvm.schedules.cuda.script import kernel_attrs, only_setting, operand_type
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

MAX_HEAD_DIM = 128  # a query's columns are held in registers


def refuses(operator: Attention, _tiles: CudaTiles) -> str:
    """Return why this kernel cannot do an attention, "" if it can."""
    if operator.head_dim > MAX_HEAD_DIM:
        return f"a head of {operator.head_dim} columns; the GPU's kernel takes {MAX_HEAD_DIM}"
    return "disentangled attention, which the GPU's kernel does not know" if operator.distance_tables else ""


def space(operator: Attention, tiles: CudaTiles) -> Space:
    """Return the decision of this kernel: few keys leave room for more blocks, many need fewer barriers."""
    return _space_of(_head_rows(operator, tiles))


def _head_rows(operator: Attention, tiles: CudaTiles) -> HeadRows:
    """Return where heads lie, and how many threads read them."""
    threads = tiles.query_tile // attention_registers.ROWS * WARP
    group = operator.heads // (operator.kv_heads or operator.heads)
    return HeadRows(operator.head_dim, operand_type(operator.q.dtype), threads, operator.operand_columns, group)


def _body(rows: HeadRows) -> ModuleType:
    """Return the file whose arithmetic is that of the operands."""
    # 3. products in tensor cores or in registers
    return attention_registers if rows.dtype == "float32" else attention_tensor_cores


def _space_of(rows: HeadRows) -> Space:
    """Return the numbers of keys for which a block has room."""
    body = _body(rows)
    keys = tuple(count for count in KEYS if body.fits(rows, count))
    return Space((Knob("keys", keys, body.usual_keys(rows), "keys in shared memory at a time"),))


def _visited(window: int | None, queries: int, first: Expr, begin: Expr, end: Expr) -> tuple[Expr, Expr]:
    """Return (begin, end) of the keys that a block visits, which has so many queries from `first` on."""
    if window is None:
        return begin, end
    # 4. only keys that some query of the block sees
    return T.max(begin, first - window), T.min(end, first + queries + window)


def attention(operator: Attention, tiles: CudaTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return the kernel `(q, k, v, query_tiles, [position_bias,] out)`: out = softmax(scale Q K^T [+ bias]) V per head.

    q, k, v: `(m, 1, width)`; they may be one buffer, and are stored alike.
    query_tiles: int32 `(nq, 3)`.
    position_bias: fp32 `(heads, 2 * max_length - 1)`, added for query i, key j at column j - i + max_length - 1.
    variants: one setting of `space` at most.

    Where k and v have fewer heads, heads / kv_heads neighbouring heads of q share one. Raises ValueError for what
    `refuses` refuses.
    """
    if reason := refuses(operator, tiles):
        raise ValueError(reason)
    heads, max_length, window = operator.heads, operator.max_length, operator.window
    (q_width, _), (k_width, _), (v_width, _) = operator.operand_columns
    stored, out_rows, position_bias = operator.q.dtype, operator.out, operator.position_bias is not None
    dtype, rows = operand_type(stored), _head_rows(operator, tiles)
    keys = only_setting(variants, _space_of(rows))["keys"]
    scores = Scores(operator.scale, max_length, position_bias, window)
    attend, warps = _body(rows).attend_macro(rows, scores, out_rows, keys), rows.threads // WARP

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        q_arg: T.handle,
        k_arg: T.handle,
        v_arg: T.handle,
        query_tiles_arg: T.handle,
        bias_arg: T.handle,
        out_arg: T.handle,
    ):
        T.func_attr(kernel_attrs(tiles.query_tile))
        m = T.int32()
        nq = T.int32()
        q_stored = T.match_buffer(q_arg, (m, 1, q_width), stored)
        k_stored = T.match_buffer(k_arg, (m, 1, k_width), stored)
        v_stored = T.match_buffer(v_arg, (m, 1, v_width), stored)
        query_tiles = T.match_buffer(query_tiles_arg, (nq, 3), "int32")
        bias = T.match_buffer(bias_arg, (heads, 2 * max_length - 1), "float32")
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        # 1. a block for a task and a head, a warp for 16 of its queries
        for tile in T.thread_binding(nq, thread="blockIdx.y"):
            for head in T.thread_binding(heads, thread="blockIdx.x"):
                for warp in T.thread_binding(warps, thread="threadIdx.y"):
                    for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                        with T.sblock("task"):
                            T.reads()
                            T.writes()
                            q_rows = T.decl_buffer((m, 1, q_width), dtype, data=q_stored.data)
                            k_rows = T.decl_buffer((m, 1, k_width), dtype, data=k_stored.data)
                            v_rows = T.decl_buffer((m, 1, v_width), dtype, data=v_stored.data)
                            first: T.let = query_tiles[tile, 0]
                            begin: T.let = query_tiles[tile, 1]
                            end: T.let = query_tiles[tile, 2]
                            visited = T.meta_var(_visited(window, tiles.query_tile, first, begin, end))
                            task = T.meta_var(Task(warp, lane, head, first, *visited))
                            # 2. to 5.: in the file of the operands' arithmetic
                            attend(task, q_rows, k_rows, v_rows, bias, result)

    return kernel if position_bias else without_parameters(kernel, ["bias"])
