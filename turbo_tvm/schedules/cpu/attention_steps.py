"""The steps of the strategy of `attention.py`, put together for a task."""

from __future__ import annotations

import math

from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_form import NARROW_LEFTOVER, Form, distances_of, head_of
from turbo_tvm.schedules.cpu.attention_queries import load_bias_macro, load_queries_macro
from turbo_tvm.schedules.cpu.attention_scores import ScoreTiles, scores_macro
from turbo_tvm.schedules.cpu.attention_softmax import softmax_macro
from turbo_tvm.schedules.cpu.attention_task import Task
from turbo_tvm.schedules.cpu.attention_weigh import pair_values_macro, weigh_macro
from turbo_tvm.schedules.cpu.distances import add_distances_macro

_LEFTOVER_KEYS = 4  # with two vectors that is 8 FMA chains, just enough to hide their latency


def attend_task_macro(form: Form) -> Macro:
    """`attend_task(chunk, number, span, fresh)`: a task; fresh: whether its keys are others than those of the last."""
    tiles, geometry, queries = form.tiles, form.geometry, form.tiles.query_tile
    load_queries = load_queries_macro(tiles.lanes, queries, geometry.panel_rows, geometry.pair_type)
    load_bias = load_bias_macro(queries, geometry.max_length, geometry.scale)
    pair_values = pair_values_macro(tiles.lanes, geometry.head_dim)
    narrow_weights, wide_weights = _narrow_weights_macro(form), _wide_weights_macro(form)
    weigh = weigh_macro(
        *(form.setting["weigh_queries"], tiles.lanes, tiles.col_tile),
        *(geometry.head_dim, geometry.in_pairs, form.accumulate),
    )

    @T.inline
    def attend_task(chunk, number, span, fresh):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            panel = T.sblock_alloc_buffer((geometry.panel_rows, queries), geometry.pair_type)
            weights = T.sblock_alloc_buffer((form.scratch_keys, queries), "float32")
            pairs = T.sblock_alloc_buffer((form.scratch_pairs, queries), bf16.PAIR)
            diagonal = T.sblock_alloc_buffer((form.diagonal_size,), "float32")
            peak = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            inverse = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            bounds = T.meta_var((span.first, span.last, span.begin, span.end))
            scratch = T.meta_var((panel, weights, pairs, chunk.values, peak, inverse, diagonal))
            task = T.meta_var(Task(*bounds, *scratch, distances_of(geometry, chunk.operands, number)))
            head = T.meta_var(head_of(geometry, chunk.operands, number))
            # 1. queries into the panel; what is added to scores and what step 4 reads, made ready beside it
            load_queries(task, head.q, head.out)
            if geometry.position_bias:
                load_bias(task, chunk.operands.bias, number)
            if geometry.in_pairs:  # noqa: SIM102  the outer one is decided when the kernel is built
                if fresh:
                    pair_values(task, head.v)
            # 2. and 3. scores and softmax, in one vector per key if the queries fit it
            if task.queries <= tiles.lanes:
                narrow_weights(task, head)
            else:
                wide_weights(task, head)
            # 4. the values, weighted
            weigh(task, head.v, head.out)

    return attend_task


def _narrow_weights_macro(form: Form) -> Macro:
    """`weights(task, head)`: steps 2 and 3 for at most a vector of queries."""
    keys = form.setting["narrow_keys"]
    return _weights_macro(form, form.tiles.lanes, keys, min(keys, NARROW_LEFTOVER))


def _wide_weights_macro(form: Form) -> Macro:
    """`weights(task, head)`: steps 2 and 3 for more queries."""
    return _weights_macro(form, form.tiles.query_tile, form.setting["score_keys"], _LEFTOVER_KEYS)


def _weights_macro(form: Form, width: int, key_tile: int, leftover: int) -> Macro:
    """`weights(task, head)`: steps 2 and 3 for `width` queries, in tiles of so many keys."""
    geometry = form.geometry
    of_keys, of_queries = geometry.key_distances, geometry.query_distances
    add = add_distances_macro(form.tiles.lanes, of_keys, of_queries, geometry.in_pairs)
    added = (geometry.position_bias, geometry.window, add if of_keys or of_queries else None)
    scores = scores_macro(ScoreTiles(width, key_tile, leftover, form.accumulate, *added))
    softmax = softmax_macro(width, geometry.scale * math.log2(math.e), geometry.in_pairs)

    @T.inline
    def weights(task, head):
        # 2. scores and their maximum
        scores(task, head.k, head.v)
        # 3. softmax, over keys
        softmax(task)

    return weights
