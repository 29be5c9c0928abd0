"""Attention in fp32: products in registers. See `attention.py`.

A lane has half of the columns of its query, and of its output: the two lanes of a query add their halves of each score
with one shuffle, then both have all weights. Keys and values are read from shared memory as 128-bit accesses, the same
for all queries of a warp.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.attention_task import CHUNK, LANES, ROWS, HeadRows, Scores, finish_macro, load_tile_macro, softmax_step_macro, start_macro
from turbo_tvm.schedules.cuda.reduction import shuffle_xor
from turbo_tvm.schedules.cuda.script import SHARED_BYTES, sync_block
from turbo_tvm.schedules.cpu.rows import RowFormat

__all__ = ["KEYS", "ROWS", "attend_macro", "fits", "usual_keys"]

KEYS = (16, 32, 64)  # that may be at hand at a time
_PAD = 4
_MOST_REGISTERS = 160  # of a thread, for numbers

Macro = Callable[..., None]


def usual_keys(rows: HeadRows) -> int:
    """How many keys are at hand at a time by default."""
    return 32


def fits(rows: HeadRows, keys_at_once: int) -> bool:
    """Whether a thread has the registers for so many weights, and a block the memory for keys and values."""
    registers = 2 * rows.chunks * CHUNK + keys_at_once
    return registers <= _MOST_REGISTERS and 2 * keys_at_once * (rows.padded + _PAD) * 4 <= SHARED_BYTES


def attend_macro(rows: HeadRows, scores: Scores, out: RowFormat, keys_at_once: int) -> Macro:
    """`attend(task, q, k, v, bias, out)`."""
    chunks, held = rows.chunks, rows.chunks * CHUNK
    load_keys, load_values = (load_tile_macro(rows, which, keys_at_once) for which in (1, 2))
    start, finish = start_macro(chunks), finish_macro(rows, out, both=False)
    softmax_step = softmax_step_macro(keys_at_once, chunks, both=False)
    ragged = rows.padded != rows.head_dim

    @T.inline
    def load_query(query, q, task):
        for i in T.unroll(chunks):
            for j in T.unroll(CHUNK):
                column = T.meta_var((i * LANES + task.side) * CHUNK + j)
                element = T.meta_var(q[T.min(task.query, task.end - 1), 0, rows.column(0, task.head) + column])
                if ragged:
                    query[i * CHUNK + j] = T.if_then_else(column < rows.head_dim, element, T.float32(0))
                else:
                    query[i * CHUNK + j] = element

    @T.inline
    def multiply_keys(weights, query, part, keys, task, first_key, bias):
        for key in T.unroll(keys_at_once):
            weights[key] = T.float32(0)
            for i in T.unroll(chunks):
                for j in T.vectorized(CHUNK):
                    part[j] = keys[key, (i * LANES + task.side) * CHUNK + j]
                for j in T.unroll(CHUNK):
                    weights[key] = weights[key] + query[i * CHUNK + j] * part[j]
            weights[key] = weights[key] + shuffle_xor(weights[key], 1)
            weights[key] = scores.score(weights[key], task, first_key + key, bias)

    @T.inline
    def add_values(sums, weights, part, values, task):
        for key in T.unroll(keys_at_once):
            for i in T.unroll(chunks):
                for j in T.vectorized(CHUNK):
                    part[j] = values[key, (i * LANES + task.side) * CHUNK + j]
                for j in T.unroll(CHUNK):
                    sums[i * CHUNK + j] = sums[i * CHUNK + j] + weights[key] * part[j]

    @T.inline
    def attend(task, q, k, v, bias, out_rows):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            keys = T.sblock_alloc_buffer((keys_at_once, rows.padded + _PAD), "float32", scope="shared")
            values = T.sblock_alloc_buffer((keys_at_once, rows.padded + _PAD), "float32", scope="shared")
            query = T.sblock_alloc_buffer((held,), "float32", scope="local")
            sums = T.sblock_alloc_buffer((held,), "float32", scope="local")
            weights = T.sblock_alloc_buffer((keys_at_once,), "float32", scope="local")
            part = T.sblock_alloc_buffer((CHUNK,), "float32", scope="local")
            state = T.sblock_alloc_buffer((3,), "float32", scope="local")
            start(state, sums)
            load_query(query, q, task)
            for step in range((task.end - task.begin + keys_at_once - 1) // keys_at_once):
                sync_block()
                load_keys(keys, k, task, task.begin + step * keys_at_once)
                load_values(values, v, task, task.begin + step * keys_at_once)
                sync_block()
                multiply_keys(weights, query, part, keys, task, task.begin + step * keys_at_once, bias)
                softmax_step(weights, state, sums)
                add_values(sums, weights, part, values, task)
            finish(task, state, sums, out_rows)

    return attend
