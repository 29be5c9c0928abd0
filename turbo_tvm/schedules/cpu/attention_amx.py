"""Attention in bf16 on CPUs with Intel AMX: `attention.py` with tile instructions.

Layout and parameters are those of `attention.attention` with q, k, v and out in bf16, head_dim a multiple of 32.

Strategy, for a task = (head, 32 queries of a sequence)
1. Once per head and sequence: its keys are copied side by side, because a tile that is loaded from activation rows
   touches 16 pages; its values are paired along keys and transposed in registers, `(head_dim, keys)`. Both repeat the
   last key up to whole blocks of 32 keys, so that tiles always have all their rows.
2. The queries are transposed into a panel of pairs, `(head_dim / 2, 32)`, as in `attention.py`.
3. Scores transposed, S[key, query] = K Q^T, in blocks of 32 x 32, four tiles. Then the maximum over keys, and softmax
   as in `attention.py`: vertical, into pairs of keys, `(keys / 2, 32)`, the layout that tiles want of a right operand.
   The keys that fill up the last block weigh 0.
4. out^T[d, query] = V^T P^T, in blocks of 32 x 32 over all keys; divided by the sums, paired along d, transposed in
   registers and stored: rows of 16 pairs.

With a window, step 1 runs once per task, for the keys that some query of it sees; those at the rim are masked when the
maximum is found.

Steps 1 and 4 are in `attention_amx_rows.py`, the products of 3 and 4 in `attention_amx_products.py`, the rest of 3 in
`attention_amx_softmax.py`.

A tile of at most 16 queries does without the right half. Surplus queries repeat the last one.

Measured (Granite Rapids, 12 heads of 64, 2 threads, alternating with `attention.py` in bf16): 4.8 times as fast at 512
tokens (1,020 GFLOP/s), 4.0 at 4 x 128, 2.2 at 8 x 32; but 0.7 times at 8 x 8, for blocks of 32 are mostly empty there.

Rejected: scores the other way round, S[query, key]. Nothing is transposed per task then, but softmax reduces across
lanes twice for every query, and keys that fill up a block need a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Attention
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.attention_amx_form import (
    BEGIN,
    END,
    FIRST,
    HEAD,
    LANES,
    LAST,
    PLACES,
    QUERIES,
    ROW,
    STEP,
    STOP,
    TASK,
    AmxChunk,
    AmxForm,
    KeyRows,
)
from turbo_tvm.schedules.cpu.attention_amx_products import scores_macro, weigh_macro
from turbo_tvm.schedules.cpu.attention_amx_rows import copy_keys_macro, store_rows_macro, turn_values_macro
from turbo_tvm.schedules.cpu.attention_amx_softmax import weights_macro
from turbo_tvm.schedules.cpu.attention_form import head_of
from turbo_tvm.schedules.cpu.attention_queries import load_queries_macro
from turbo_tvm.schedules.cpu.attention_task import Heads, Operands, Task
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def refuses(operator: Attention, tiles: CpuTiles) -> str:
    """Return why this kernel does not run an attention, "" if it does; it knows no biases and no tables."""
    if not tiles.amx or operator.q.dtype != bf16.STORAGE or operator.out.dtype != bf16.STORAGE:
        return "it is no attention in bf16 on AMX"
    if operator.position_bias is not None or operator.distance_tables:
        return "AMX's kernel knows no biases by distance"
    return "" if operator.head_dim % STEP == 0 else f"heads of {operator.head_dim} are no multiples of {STEP}"


def space(_operator: Attention, _tiles: CpuTiles) -> Space:
    """Return the decisions of this kernel."""
    return Space(
        (
            Knob("chunks", (16, 48, 96, 192), 48, "parallel iterations: a multiple of the usual core counts"),
            Knob("fetch", (0, 1), 0, "whether the next sequence's keys and values are asked for beside the scores"),
        )
    )


def attention(
    operator: Attention, tiles: CpuTiles, variants: Sequence[Variant] = (), instructions: str = amx.LLVM
) -> tvm.tirx.PrimFunc:
    """Return `(q, k, v, query_tiles, out)`, as `attention.attention`; all rows in bf16.

    variants: settings of `space` by rows. instructions: LLVM IR that defines the functions of `amx.py`. Raises
    ValueError for what `refuses` refuses.
    """
    reason = refuses(operator, tiles)
    if reason or tiles.query_tile != QUERIES:
        raise ValueError(f"this attention does not fit AMX: {reason or f'{tiles.query_tile} queries at once'}")
    geometry, choices = Heads.of(operator), space(operator, tiles)
    attend = by_rows(
        variants, choices, tiles.row_tile, lambda setting: _attend_macro(AmxForm(tiles, geometry, setting))
    )
    x, out = operator.q, operator.out
    (q_width, _), (k_width, _), (v_width, _) = geometry.q, geometry.k, geometry.v

    @T.prim_func(private=True, s_tir=True)
    def kernel(q_arg: T.handle, k_arg: T.handle, v_arg: T.handle, query_tiles_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        nq = T.int64()
        q_in = T.match_buffer(q_arg, (t, tiles.row_tile, q_width), x.dtype)
        k_in = T.match_buffer(k_arg, (t, tiles.row_tile, k_width), x.dtype)
        v_in = T.match_buffer(v_arg, (t, tiles.row_tile, v_width), x.dtype)
        query_tiles = T.match_buffer(query_tiles_arg, (nq, 3), "int32")
        result = T.match_buffer(out_arg, (t, tiles.row_tile, out.width), out.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", instructions):
            operands = T.meta_var(Operands(q_in, k_in, v_in, query_tiles, result))
            attend(t, operands)

    return kernel


def _attend_macro(form: AmxForm) -> Macro:
    """`attend(t, operands)`: the whole strategy for a batch of t row tiles."""
    chunks, heads = form.setting["chunks"], form.geometry.heads
    do_task = _task_macro(form)

    @T.inline
    def attend(t, operands):
        nq = T.meta_var(operands.query_tiles.shape[0])
        for chunk in T.parallel(T.min(heads * nq, chunks)):
            with T.sblock("chunk"):
                T.reads()
                T.writes()
                q_seen = T.decl_buffer(_in_pairs(operands.q), bf16.PAIR, data=operands.q.data)
                k_seen = T.decl_buffer(_in_pairs(operands.k), bf16.PAIR, data=operands.k.data)
                v_seen = T.decl_buffer(_in_pairs(operands.v), bf16.PAIR, data=operands.v.data)
                out_seen = T.decl_buffer(_in_pairs(operands.out), bf16.PAIR, data=operands.out.data)
                keys = T.sblock_alloc_buffer((form.most_keys, form.pairs_of_head), bf16.PAIR)
                values = T.sblock_alloc_buffer((form.geometry.head_dim, form.value_width), bf16.PAIR)
                shapes = T.sblock_alloc_buffer((8,), "int64")
                place = T.sblock_alloc_buffer((PLACES,), "int64")
                seen = T.meta_var(replace(operands, q=q_seen, k=k_seen, v=v_seen, out=out_seen))
                amx.configure(shapes, T.int64(amx.ROWS), T.int64(amx.ROWS), T.int64(amx.PAIRS))
                place[TASK] = chunk * (heads * nq) // T.min(heads * nq, chunks)
                place[STOP] = (chunk + 1) * (heads * nq) // T.min(heads * nq, chunks)
                for i in range(place[STOP] - place[TASK]):
                    do_task(AmxChunk(seen, keys, values, place), i)
                amx.release()

    return attend


def _in_pairs(rows: tvm.tirx.Buffer) -> tuple[object, ...]:
    """Return the shape of rows of bf16, seen as pairs."""
    return rows.shape[0], rows.shape[1], rows.shape[2] // 2


def _task_macro(form: AmxForm) -> Macro:
    """`do_task(chunk, i)`: the next task of a chunk, its number i, with step 1 where its keys are others."""
    geometry, window = form.geometry, form.geometry.window
    locate, attend_task = _locate_macro(form), _attend_task_macro(form)
    copy_keys, turn_values = copy_keys_macro(), turn_values_macro()

    @T.inline
    def do_task(chunk, i):
        place = T.meta_var(chunk.place)
        locate(place, chunk.operands.query_tiles)
        head = T.meta_var(head_of(geometry, chunk.operands, place[HEAD]))
        # 1. once per head and sequence, with a window once per task
        if True if window is not None else T.bitwise_or(place[FIRST] == place[BEGIN], i == 0):
            copy_keys(KeyRows(head.k, place[BEGIN], place[END]), chunk.keys)
            turn_values(KeyRows(head.v, place[BEGIN], place[END]), chunk.values)
        attend_task(chunk, head)
        place[TASK] = place[TASK] + 1

    return do_task


def _locate_macro(form: AmxForm) -> Macro:
    """`locate(place, query_tiles)` fills in the place of the task: its head, its queries, the keys that they see."""
    window = form.geometry.window

    @T.inline
    def locate(place, query_tiles):
        place[HEAD] = place[TASK] // query_tiles.shape[0]
        place[ROW] = place[TASK] - place[HEAD] * query_tiles.shape[0]
        place[FIRST] = T.cast(query_tiles[place[ROW], 0], "int64")
        place[BEGIN] = T.cast(query_tiles[place[ROW], 1], "int64")
        place[END] = T.cast(query_tiles[place[ROW], 2], "int64")
        place[LAST] = T.min(place[END], place[FIRST] + QUERIES)
        if window is not None:
            place[BEGIN] = T.max(place[BEGIN], place[FIRST] - window)
            place[END] = T.min(place[END], place[LAST] + window)

    return locate


def _attend_task_macro(form: AmxForm) -> Macro:
    """`attend_task(chunk, head)`: steps 2 to 4 for a task."""
    load_queries = load_queries_macro(LANES, QUERIES, form.pairs_of_head, bf16.PAIR)
    narrow, wide = _products_macro(form, LANES), _products_macro(form, QUERIES)
    store_rows = store_rows_macro(form.geometry.head_dim)

    @T.inline
    def attend_task(chunk, head):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            panel = T.sblock_alloc_buffer((form.pairs_of_head, QUERIES), bf16.PAIR)
            weights = T.sblock_alloc_buffer((form.most_keys, QUERIES), "float32")
            pairs = T.sblock_alloc_buffer((form.most_keys // 2, QUERIES), bf16.PAIR)
            turned = T.sblock_alloc_buffer((form.geometry.head_dim, QUERIES), "float32")
            peak = T.sblock_alloc_buffer((QUERIES,), "float32", scope="local")
            inverse = T.sblock_alloc_buffer((QUERIES,), "float32", scope="local")
            bounds = T.meta_var((chunk.span.first, chunk.span.last, chunk.span.begin, chunk.span.end))
            task = T.meta_var(Task(*bounds, panel, weights, pairs, chunk.values, peak, inverse))
            # 2. queries into the panel
            load_queries(task, head.q, head.out)
            # 3. and 4. the products and what lies between, with or without the right half
            if task.queries <= LANES:
                narrow(task, chunk.keys, head, turned)
            else:
                wide(task, chunk.keys, head, turned)
            # 4. rows of pairs again
            store_rows(task, turned, head.out)

    return attend_task


def _products_macro(form: AmxForm, width: int) -> Macro:
    """`products(task, keys, head, turned)`: steps 3 and 4 up to the sums over keys, for at most `width` queries."""
    both = width == QUERIES
    scores, weigh = scores_macro(form, both), weigh_macro(form, both)
    weights = weights_macro(width, form.geometry)

    @T.inline
    def products(task, keys, head, turned):
        # 3. scores, transposed, then softmax over keys
        scores(task, keys, head)
        weights(task)
        # 4. values, weighted
        weigh(task, turned)

    return products
