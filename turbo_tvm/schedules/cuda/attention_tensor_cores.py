"""Attention in fp16 and bf16: products in tensor cores. See `attention.py`.

A warp multiplies its 16 queries with the keys at hand, 16 x 16 x 16 at a time. What a lane holds of a fragment is the
hardware's secret, so scores pass through the warp's own part of shared memory to the two lanes of their query, and
weights back; so do the products with the values, which each lane adds to its columns in fp32 registers. Only warps wait
there: the block meets twice per step, for the tiles of keys and values.

The queries stay in fragments from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.attention_task import CHUNK, LANES, ROWS, HeadRows, Scores, finish_macro, load_tile_macro, softmax_step_macro, start_macro
from turbo_tvm.schedules.cuda.block_product import FRAGMENT
from turbo_tvm.schedules.cuda.products import fragment
from turbo_tvm.schedules.cuda.script import SHARED_BYTES, sync_block, sync_warp
from turbo_tvm.schedules.cpu.rows import RowFormat

__all__ = ["KEYS", "ROWS", "attend_macro", "fits", "usual_keys"]

KEYS = (16, 32, 64)  # that may be at hand at a time
_GROUP = 64  # columns that pass through shared memory together
_PAD = 8

Macro = Callable[..., None]


def usual_keys(rows: HeadRows) -> int:
    """How many keys are at hand at a time by default: as many as shared memory has room for."""
    return 64 if rows.padded <= 64 else 32


def fits(rows: HeadRows, keys_at_once: int) -> bool:
    """Whether a block has the memory for so many keys and values, and for scores and weights on their way."""
    both = 2 * keys_at_once * (rows.padded + _PAD) * rows.itemsize
    passing = rows.threads // 32 * ROWS * _width(rows, keys_at_once) * (rows.itemsize + 4)
    return both + passing <= SHARED_BYTES


def _width(rows: HeadRows, keys_at_once: int) -> int:
    """Elements of a row in which scores, weights and products pass through shared memory."""
    return min(_GROUP, max(keys_at_once, rows.padded)) + _PAD


def attend_macro(rows: HeadRows, scores: Scores, out: RowFormat, keys_at_once: int) -> Macro:
    """`attend(task, q, k, v, bias, out)`."""
    dtype, padded, chunks, warps = rows.dtype, rows.padded, rows.chunks, rows.threads // 32
    width, stride = _width(rows, keys_at_once), padded + _PAD
    mine = keys_at_once // LANES  # keys of a lane
    load_keys, load_values = (load_tile_macro(rows, which, keys_at_once) for which in (1, 2))
    start, finish = start_macro(chunks), finish_macro(rows, out, both=True)
    softmax_step = softmax_step_macro(mine, chunks, both=True)
    groups = [(first, min(_GROUP, padded - first)) for first in range(0, padded, _GROUP)]
    vector = rows.vector

    def place(task, i):
        """The column of element i of a lane: chunks of neighbours, every second one."""
        return (i // CHUNK * LANES + task.side) * CHUNK + i % CHUNK

    @T.inline
    def load_queries(query, weights, q, task, group, again):
        first = T.meta_var(groups[group][0])
        columns = T.meta_var(groups[group][1])
        for i in T.unroll(-(-(ROWS * columns // vector) // 32)):
            piece = T.meta_var(i * 32 + task.lane)
            column = T.meta_var(piece % (columns // vector) * vector)
            row = T.meta_var(T.min(task.first + task.warp * ROWS + piece // (columns // vector), task.end - 1))
            if piece < ROWS * columns // vector:
                if first + column < rows.head_dim:
                    for j in T.vectorized(vector):
                        weights[task.warp, piece // (columns // vector), column + j] = q[
                            row, 0, rows.column(0, task.head) + first + column + j
                        ]
                else:
                    for j in T.unroll(vector):
                        weights[task.warp, piece // (columns // vector), column + j] = T.cast(T.float32(0), dtype)
        sync_warp()
        for i in T.unroll(columns // FRAGMENT):
            T.evaluate(
                T.tvm_load_matrix_sync(
                    *fragment(query, first // FRAGMENT + i),
                    T.address_of(weights[task.warp, 0, i * FRAGMENT]),
                    width,
                    "row_major",
                )
            )
        sync_warp()
        if group + 1 < len(groups):
            again(query, weights, q, task, group + 1, again)

    @T.inline
    def multiply_keys(product, query, key_part, keys, passage, task):
        for c in T.unroll(keys_at_once // FRAGMENT):
            T.evaluate(T.tvm_fill_fragment(*fragment(product, 0), T.float32(0)))
            for i in T.unroll(padded // FRAGMENT):
                T.evaluate(
                    T.tvm_load_matrix_sync(
                        *fragment(key_part, 0),
                        T.address_of(keys[c * FRAGMENT, i * FRAGMENT]),
                        stride,
                        "col_major",
                    )
                )
                T.evaluate(T.tvm_mma_sync(product.data, 0, query.data, i, key_part.data, 0, product.data, 0))
            T.evaluate(
                T.tvm_store_matrix_sync(
                    *fragment(product, 0),
                    T.address_of(passage[task.warp, 0, c * FRAGMENT]),
                    width,
                    "row_major",
                )
            )
        sync_warp()

    @T.inline
    def read_scores(held, passage, task, first_key, bias):
        for i in T.unroll(mine // CHUNK):
            for j in T.vectorized(CHUNK):
                held[i * CHUNK + j] = passage[task.warp, task.lane // LANES, (i * LANES + task.side) * CHUNK + j]
        for i in T.unroll(mine):
            held[i] = scores.score(held[i], task, first_key + place(task, i), bias)

    @T.inline
    def write_weights(weights, held, task):
        for i in T.unroll(mine // CHUNK):
            with T.sblock("weights"):
                T.reads()
                T.writes()
                raw = T.sblock_alloc_buffer((CHUNK,), dtype, scope="local")
                for j in T.unroll(CHUNK):
                    raw[j] = T.cast(held[i * CHUNK + j], dtype)
                for j in T.vectorized(CHUNK):
                    weights[task.warp, task.lane // LANES, (i * LANES + task.side) * CHUNK + j] = raw[j]
        sync_warp()

    @T.inline
    def add_values(sums, product, weight_part, value_part, weights, values, passage, part, task, group, again):
        first = T.meta_var(groups[group][0])
        columns = T.meta_var(groups[group][1])
        for c in T.unroll(columns // FRAGMENT):
            T.evaluate(T.tvm_fill_fragment(*fragment(product, 0), T.float32(0)))
            for i in T.unroll(keys_at_once // FRAGMENT):
                T.evaluate(
                    T.tvm_load_matrix_sync(
                        *fragment(weight_part, 0),
                        T.address_of(weights[task.warp, 0, i * FRAGMENT]),
                        width,
                        "row_major",
                    )
                )
                T.evaluate(
                    T.tvm_load_matrix_sync(
                        *fragment(value_part, 0),
                        T.address_of(values[i * FRAGMENT, first + c * FRAGMENT]),
                        stride,
                        "row_major",
                    )
                )
                T.evaluate(T.tvm_mma_sync(product.data, 0, weight_part.data, 0, value_part.data, 0, product.data, 0))
            T.evaluate(
                T.tvm_store_matrix_sync(
                    *fragment(product, 0),
                    T.address_of(passage[task.warp, 0, c * FRAGMENT]),
                    width,
                    "row_major",
                )
            )
        sync_warp()
        for i in T.unroll(columns // (CHUNK * LANES)):
            for j in T.vectorized(CHUNK):
                part[j] = passage[task.warp, task.lane // LANES, (i * LANES + task.side) * CHUNK + j]
            for j in T.unroll(CHUNK):
                sums[first // LANES + i * CHUNK + j] = sums[first // LANES + i * CHUNK + j] + part[j]
        sync_warp()
        if group + 1 < len(groups):
            again(sums, product, weight_part, value_part, weights, values, passage, part, task, group + 1, again)

    @T.inline
    def attend(task, q, k, v, bias, out_rows):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            keys = T.sblock_alloc_buffer((keys_at_once, stride), dtype, scope="shared")
            values = T.sblock_alloc_buffer((keys_at_once, stride), dtype, scope="shared")
            weights = T.sblock_alloc_buffer((warps, ROWS, width), dtype, scope="shared")
            passage = T.sblock_alloc_buffer((warps, ROWS, width), "float32", scope="shared")
            query = T.sblock_alloc_buffer((padded * FRAGMENT,), dtype, scope="wmma.matrix_a")
            weight_part = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), dtype, scope="wmma.matrix_a")
            key_part = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), dtype, scope="wmma.matrix_b")
            value_part = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), dtype, scope="wmma.matrix_b")
            product = T.sblock_alloc_buffer((FRAGMENT * FRAGMENT,), "float32", scope="wmma.accumulator")
            held = T.sblock_alloc_buffer((mine,), "float32", scope="local")
            sums = T.sblock_alloc_buffer((chunks * CHUNK,), "float32", scope="local")
            part = T.sblock_alloc_buffer((CHUNK,), "float32", scope="local")
            state = T.sblock_alloc_buffer((3,), "float32", scope="local")
            start(state, sums)
            load_queries(query, weights, q, task, 0, load_queries)
            for step in range((task.end - task.begin + keys_at_once - 1) // keys_at_once):
                sync_block()
                load_keys(keys, k, task, task.begin + step * keys_at_once)
                load_values(values, v, task, task.begin + step * keys_at_once)
                sync_block()
                multiply_keys(product, query, key_part, keys, passage, task)
                read_scores(held, passage, task, task.begin + step * keys_at_once, bias)
                softmax_step(held, state, sums)
                write_weights(weights, held, task)
                add_values(sums, product, weight_part, value_part, weights, values, passage, part, task, 0, add_values)
            finish(task, state, sums, out_rows)

    return attend
