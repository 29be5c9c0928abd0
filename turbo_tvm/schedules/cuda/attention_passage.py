"""What a warp's attention in tensor cores passes through shared memory: queries, scores and weights.

What a lane holds of a fragment is the hardware's secret, so everything that a lane is to see, or to bring into a
fragment, lies in the warp's own part of shared memory for a while. See `attention_tensor_cores.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cuda.attention_task import CHUNK, LANES, ROWS, HeadRows, Scores, Task
from turbo_tvm.schedules.cuda.block_product import FRAGMENT, WARP
from turbo_tvm.schedules.cuda.fragments import load_fragment
from turbo_tvm.schedules.cuda.script import sync_warp

_GROUP = 64  # columns that pass through shared memory together
_PAD = 8  # elements after each row of a tile


@dataclass(frozen=True)
class Shape:
    """The geometry of a step: 16 queries of each warp against so many keys."""

    rows: HeadRows
    keys: int  # at hand at a time

    @property
    def width(self) -> int:
        """Return the elements of a row in which scores, weights and products pass through shared memory."""
        return min(_GROUP, max(self.keys, self.rows.padded)) + _PAD

    @property
    def stride(self) -> int:
        """Return the elements of a row of keys or values in shared memory."""
        return self.rows.padded + _PAD

    @property
    def warps(self) -> int:
        """Return the warps of a block."""
        return self.rows.threads // WARP

    @property
    def keys_of_lane(self) -> int:
        """Return how many keys a lane has the scores of."""
        return self.keys // LANES

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Return (first column, how many) of each group of columns that pass together."""
        padded = self.rows.padded
        return [(first, min(_GROUP, padded - first)) for first in range(0, padded, _GROUP)]


@dataclass(frozen=True)
class Memory:
    """What a block shares, and what a warp and a lane hold."""

    weights: tvm.tirx.Buffer  # shared `(warps, ROWS, width)`: weights, and queries before the first step
    passage: tvm.tirx.Buffer  # shared fp32 `(warps, ROWS, width)`: scores, and products with values
    query: tvm.tirx.Buffer  # fragments of the queries
    weight_part: tvm.tirx.Buffer  # a fragment of weights
    key_part: tvm.tirx.Buffer  # a fragment of keys
    value_part: tvm.tirx.Buffer  # a fragment of values
    product: tvm.tirx.Buffer  # a fragment of either product, fp32
    held: tvm.tirx.Buffer  # local fp32 `(keys_of_lane,)`: the lane's scores, then weights
    sums: tvm.tirx.Buffer  # local fp32 `(chunks * CHUNK,)`: the lane's columns of the output, before the division
    part: tvm.tirx.Buffer  # local fp32 `(CHUNK,)`: an access to products with values


def load_queries_macro(shape: Shape) -> Macro:
    """Return `load_queries(memory, q, task, group, again)`: bring the warp's queries into fragments.

    They pass where weights lie later, a group of columns at a time. again: the macro itself.
    """
    rows, vector, groups = shape.rows, shape.rows.vector, shape.groups

    @T.inline
    def load_queries(memory, q, task, group, again):
        first = T.meta_var(groups[group][0])
        columns = T.meta_var(groups[group][1])
        # 1. 16 queries of a warp
        for i in T.unroll(-(-(ROWS * columns // vector) // WARP)):
            piece = T.meta_var(i * WARP + task.lane)
            column = T.meta_var(piece % (columns // vector) * vector)
            row = T.meta_var(T.min(task.first + task.warp * ROWS + piece // (columns // vector), task.end - 1))
            if piece < ROWS * columns // vector:
                if first + column < rows.head_dim:
                    for j in T.vectorized(vector):
                        memory.weights[task.warp, piece // (columns // vector), column + j] = q[
                            row, 0, rows.column(0, task.head) + first + column + j
                        ]
                else:
                    for j in T.unroll(vector):
                        memory.weights[task.warp, piece // (columns // vector), column + j] = T.cast(
                            T.float32(0), rows.dtype
                        )
        sync_warp()
        for i in T.unroll(columns // FRAGMENT):
            load_fragment(
                (memory.query, first // FRAGMENT + i), memory.weights[task.warp, 0, i * FRAGMENT], shape.width
            )
        sync_warp()
        if group + 1 < len(groups):
            again(memory, q, task, group + 1, again)

    return load_queries


def _place(task: Task, i: Expr) -> Expr:
    """Return the column of element i of a lane: chunks of neighbours, every second one."""
    return (i // CHUNK * LANES + task.side) * CHUNK + i % CHUNK


def read_scores_macro(shape: Shape, scores: Scores) -> Macro:
    """Return `read_scores(memory, task, first_key, bias)`: make scores of the lane's products."""
    mine = shape.keys_of_lane

    @T.inline
    def read_scores(memory, task, first_key, bias):
        for i in T.unroll(mine // CHUNK):
            for j in T.vectorized(CHUNK):
                memory.held[i * CHUNK + j] = memory.passage[
                    task.warp, task.lane // LANES, (i * LANES + task.side) * CHUNK + j
                ]
        for i in T.unroll(mine):
            memory.held[i] = scores.score(memory.held[i], task, first_key + _place(task, i), bias)

    return read_scores


def write_weights_macro(shape: Shape) -> Macro:
    """Return `write_weights(memory, task)`: round the lane's weights, and let the warp have them."""

    @T.inline
    def write_weights(memory, task):
        for i in T.unroll(shape.keys_of_lane // CHUNK):
            with T.sblock("weights"):
                T.reads()
                T.writes()
                raw = T.sblock_alloc_buffer((CHUNK,), shape.rows.dtype, scope="local")
                for j in T.unroll(CHUNK):
                    raw[j] = T.cast(memory.held[i * CHUNK + j], shape.rows.dtype)
                for j in T.vectorized(CHUNK):
                    memory.weights[task.warp, task.lane // LANES, (i * LANES + task.side) * CHUNK + j] = raw[j]
        sync_warp()

    return write_weights
