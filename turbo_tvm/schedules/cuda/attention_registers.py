"""Attention in fp32: products in registers.

A lane has half of the columns of its query, and of its output: the two lanes of a query add their halves of each score
with one shuffle, then both have all weights. Keys and values are read from shared memory as 128-bit accesses, the same
for all queries of a warp.

Numbered steps in the bodies are those of the strategy in `attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro
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
from turbo_tvm.schedules.cuda.reduction import shuffle_xor
from turbo_tvm.schedules.cuda.script import SHARED_BYTES, sync_block

__all__ = ["ROWS", "attend_macro", "fits", "usual_keys"]

_PAD = 4  # elements after each row of a tile
_MOST_REGISTERS = 160  # of a thread, for numbers


@dataclass(frozen=True)
class _Lane:
    """What a lane holds in registers, local fp32."""

    query: tvm.tirx.Buffer  # `(chunks * CHUNK,)`, its columns of the query
    sums: tvm.tirx.Buffer  # `(chunks * CHUNK,)`, its columns of the output, before the division
    weights: tvm.tirx.Buffer  # `(keys,)`, scores first, then weights
    part: tvm.tirx.Buffer  # `(CHUNK,)`, an access to keys or values
    state: tvm.tirx.Buffer  # `(3,)`, of the online softmax


def usual_keys(rows: HeadRows) -> int:
    """Return how many keys are at hand at a time by default."""
    return 32


def fits(rows: HeadRows, keys_at_once: int) -> bool:
    """Return whether a thread has registers for so many weights, and a block shared memory for keys and values."""
    registers = 2 * rows.chunks * CHUNK + keys_at_once
    return registers <= _MOST_REGISTERS and 2 * keys_at_once * (rows.padded + _PAD) * 4 <= SHARED_BYTES


def attend_macro(rows: HeadRows, scores: Scores, out: Operand, keys_at_once: int) -> Macro:
    """Return `attend(task, q, k, v, bias, out)`: the attention of a block's queries."""
    held = rows.chunks * CHUNK
    load_query = _load_query_macro(rows)
    load_keys, load_values = (load_tile_macro(rows, which, keys_at_once) for which in (1, 2))
    multiply_keys, add_values = _multiply_keys_macro(rows, scores, keys_at_once), _add_values_macro(rows, keys_at_once)
    start, softmax_step = start_macro(rows.chunks), softmax_step_macro(keys_at_once, rows.chunks, both=False)
    finish = finish_macro(rows, out, both=False)

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
            lane = T.meta_var(_Lane(query, sums, weights, part, state))
            start(state, sums)
            load_query(query, q, task)
            # 1. some dozens of keys at a time
            for step in range((task.end - task.begin + keys_at_once - 1) // keys_at_once):
                sync_block()
                load_keys(keys, k, task, task.begin + step * keys_at_once)
                load_values(values, v, task, task.begin + step * keys_at_once)
                sync_block()
                multiply_keys(lane, keys, task, task.begin + step * keys_at_once, bias)
                softmax_step(weights, state, sums)
                add_values(lane, values, task)
            finish(task, state, sums, out_rows)

    return attend


def _load_query_macro(rows: HeadRows) -> Macro:
    """Return `load_query(query, q, task)`: read the lane's columns of its query, zeros past the head's columns."""
    ragged = rows.padded != rows.head_dim

    @T.inline
    def load_query(query, q, task):
        # 1. two lanes a query
        for i in T.unroll(rows.chunks):
            for j in T.unroll(CHUNK):
                column = T.meta_var((i * LANES + task.side) * CHUNK + j)
                element = T.meta_var(q[T.min(task.query, task.end - 1), 0, rows.column(0, task.head) + column])
                if ragged:
                    query[i * CHUNK + j] = T.if_then_else(column < rows.head_dim, element, T.float32(0))
                else:
                    query[i * CHUNK + j] = element

    return load_query


def _multiply_keys_macro(rows: HeadRows, scores: Scores, keys_at_once: int) -> Macro:
    """Return `multiply_keys(lane, keys, task, first_key, bias)`: fill the lane's weights with scores."""

    @T.inline
    def multiply_keys(lane, keys, task, first_key, bias):
        # 3. Q K^T in registers: the lane's half, and the other lane's
        for key in T.unroll(keys_at_once):
            lane.weights[key] = T.float32(0)
            for i in T.unroll(rows.chunks):
                for j in T.vectorized(CHUNK):
                    lane.part[j] = keys[key, (i * LANES + task.side) * CHUNK + j]
                for j in T.unroll(CHUNK):
                    lane.weights[key] = lane.weights[key] + lane.query[i * CHUNK + j] * lane.part[j]
            lane.weights[key] = lane.weights[key] + shuffle_xor(lane.weights[key], 1)
            lane.weights[key] = scores.score(lane.weights[key], task, first_key + key, bias)

    return multiply_keys


def _add_values_macro(rows: HeadRows, keys_at_once: int) -> Macro:
    """Return `add_values(lane, values, task)`: add the weighted values to the lane's sums."""

    @T.inline
    def add_values(lane, values, task):
        # 3. P V in registers, the lane's columns
        for key in T.unroll(keys_at_once):
            for i in T.unroll(rows.chunks):
                for j in T.vectorized(CHUNK):
                    lane.part[j] = values[key, (i * LANES + task.side) * CHUNK + j]
                for j in T.unroll(CHUNK):
                    lane.sums[i * CHUNK + j] = lane.sums[i * CHUNK + j] + lane.weights[key] * lane.part[j]

    return add_values
