"""Attention in fp16 and bf16: products in tensor cores.

A warp multiplies its 16 queries with the keys at hand, 16 x 16 x 16 at a time. What a lane holds of a fragment is the
hardware's secret, so scores pass through the warp's own part of shared memory to the two lanes of their query, and
weights back; so do the products with the values, which each lane adds to its columns in fp32 registers. Only warps wait
there: the block meets twice per step, for the tiles of keys and values.

The queries stay in fragments from the first step to the last.

Numbered steps in the bodies are those of the strategy in `attention.py`.
"""

from __future__ import annotations

from tvm.script import tirx as T

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cuda.attention_passage import (
    Memory,
    Shape,
    load_queries_macro,
    read_scores_macro,
    write_weights_macro,
)
from turbo_tvm.schedules.cuda.attention_task import (
    CHUNK,
    LANES,
    ROWS,
    HeadRows,
    Scores,
    finish_macro,
    load_tile_macro,
    softmax_step_macro,
    start_macro,
)
from turbo_tvm.schedules.cuda.block_product import FRAGMENT
from turbo_tvm.schedules.cuda.fragments import clear_fragment, load_fragment, multiply_fragments, store_fragment
from turbo_tvm.schedules.cuda.script import SHARED_BYTES, sync_block, sync_warp

__all__ = ["ROWS", "attend_macro", "fits", "usual_keys"]


def usual_keys(rows: HeadRows) -> int:
    """Return how many keys are at hand at a time by default: as many as shared memory has room for."""
    return 64 if rows.padded <= 64 else 32


def fits(rows: HeadRows, keys_at_once: int) -> bool:
    """Return whether a block has memory for so many keys and values, and for scores and weights on their way."""
    shape = Shape(rows, keys_at_once)
    both = 2 * keys_at_once * shape.stride * rows.itemsize
    passing = shape.warps * ROWS * shape.width * (rows.itemsize + 4)
    return both + passing <= SHARED_BYTES


def attend_macro(rows: HeadRows, scores: Scores, out: Operand, keys_at_once: int) -> Macro:
    """Return `attend(task, q, k, v, bias, out)`: the attention of a block's queries."""
    shape, dtype = Shape(rows, keys_at_once), rows.dtype
    load_keys, load_values = (load_tile_macro(rows, which, keys_at_once) for which in (1, 2))
    load_queries, multiply_keys = load_queries_macro(shape), _multiply_keys_macro(shape)
    read_scores, write_weights = read_scores_macro(shape, scores), write_weights_macro(shape)
    add_values = _add_values_macro(shape)
    start, softmax_step = start_macro(rows.chunks), softmax_step_macro(shape.keys_of_lane, rows.chunks, both=True)
    finish = finish_macro(rows, out, both=True)

    @T.inline
    def attend(task, q, k, v, bias, out_rows):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            keys = T.sblock_alloc_buffer((keys_at_once, shape.stride), dtype, scope="shared")
            values = T.sblock_alloc_buffer((keys_at_once, shape.stride), dtype, scope="shared")
            weights = T.sblock_alloc_buffer((shape.warps, ROWS, shape.width), dtype, scope="shared")
            passage = T.sblock_alloc_buffer((shape.warps, ROWS, shape.width), "float32", scope="shared")
            query = T.sblock_alloc_buffer((rows.padded * FRAGMENT,), dtype, scope="wmma.matrix_a")
            weight_part = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), dtype, scope="wmma.matrix_a")
            key_part = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), dtype, scope="wmma.matrix_b")
            value_part = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), dtype, scope="wmma.matrix_b")
            product = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), "float32", scope="wmma.accumulator")
            held = T.sblock_alloc_buffer((shape.keys_of_lane,), "float32", scope="local")
            sums = T.sblock_alloc_buffer((rows.chunks * CHUNK,), "float32", scope="local")
            part = T.sblock_alloc_buffer((CHUNK,), "float32", scope="local")
            state = T.sblock_alloc_buffer((3,), "float32", scope="local")
            memory = T.meta_var(
                Memory(weights, passage, query, weight_part, key_part, value_part, product, held, sums, part)
            )
            start(state, sums)
            load_queries(memory, q, task, 0, load_queries)
            # 1. some dozens of keys at a time
            for step in range((task.end - task.begin + keys_at_once - 1) // keys_at_once):
                sync_block()
                load_keys(keys, k, task, task.begin + step * keys_at_once)
                load_values(values, v, task, task.begin + step * keys_at_once)
                sync_block()
                multiply_keys(memory, keys, task)
                read_scores(memory, task, task.begin + step * keys_at_once, bias)
                softmax_step(held, state, sums)
                write_weights(memory, task)
                add_values(memory, values, task, 0, add_values)
            finish(task, state, sums, out_rows)

    return attend


def _multiply_keys_macro(shape: Shape) -> Macro:
    """Return `multiply_keys(memory, keys, task)`: leave products of queries and keys in the warp's passage."""
    steps = shape.rows.padded // FRAGMENT

    @T.inline
    def multiply_keys(memory, keys, task):
        # 3. Q K^T in tensor cores, 16 keys at a time
        for c in T.unroll(shape.keys // FRAGMENT):
            clear_fragment((memory.product, 0))
            for i in T.unroll(steps):
                load_fragment((memory.key_part, 0), keys[c * FRAGMENT, i * FRAGMENT], shape.stride, "col_major")
                multiply_fragments((memory.product, 0), (memory.query, i), (memory.key_part, 0))
            store_fragment((memory.product, 0), memory.passage[task.warp, 0, c * FRAGMENT], shape.width)
        sync_warp()

    return multiply_keys


def _add_values_macro(shape: Shape) -> Macro:
    """Return `add_values(memory, values, task, group, again)`: add the weighted values to the lane's sums.

    The products pass through shared memory, a group of columns at a time. again: the macro itself.
    """
    groups = shape.groups

    @T.inline
    def add_values(memory, values, task, group, again):
        first = T.meta_var(groups[group][0])
        columns = T.meta_var(groups[group][1])
        # 3. P V in tensor cores, 16 columns at a time
        for c in T.unroll(columns // FRAGMENT):
            clear_fragment((memory.product, 0))
            for i in T.unroll(shape.keys // FRAGMENT):
                load_fragment((memory.weight_part, 0), memory.weights[task.warp, 0, i * FRAGMENT], shape.width)
                load_fragment((memory.value_part, 0), values[i * FRAGMENT, first + c * FRAGMENT], shape.stride)
                multiply_fragments((memory.product, 0), (memory.weight_part, 0), (memory.value_part, 0))
            store_fragment((memory.product, 0), memory.passage[task.warp, 0, c * FRAGMENT], shape.width)
        sync_warp()
        for i in T.unroll(columns // (CHUNK * LANES)):
            for j in T.vectorized(CHUNK):
                memory.part[j] = memory.passage[task.warp, task.lane // LANES, (i * LANES + task.side) * CHUNK + j]
            for j in T.unroll(CHUNK):
                memory.sums[first // LANES + i * CHUNK + j] = (
                    memory.sums[first // LANES + i * CHUNK + j] + memory.part[j]
                )
        sync_warp()
        if group + 1 < len(groups):
            again(memory, values, task, group + 1, again)

    return add_values
