"""Attention of a packed ragged batch on the CPU: softmax(scale Q K^T [+ bias]) V, per sequence and head. fp32.

Layout: activations `(t, R, columns)`, R = `tiles.row_tile`, t symbolic; row r of the batch is [r // R, r % R].
`query_tiles`: int32 `(nq, 3)`, rows (first_row, seq_begin, seq_end): up to Q = `tiles.query_tile` queries from
`first_row` on (fewer where the sequence ends) against the keys [seq_begin, seq_end). Rows of other sequences are
neither used nor written; surplus rows are left as they are.

Strategy, for a task = (head, query tile)
1. The queries, scaled, are transposed in registers into a panel `(head_dim, Q)`: queries lie across the lanes.
2. Scores are computed transposed, S[key, query], in tiles of R keys by Q queries: one broadcast of K and two vectors
   of the panel per FMA pair, so K needs no packing. Keys left over go in tiles of 4, whose surplus rows repeat the
   last key: no mask, no -inf. A tile of at most `lanes` queries takes one vector and 8 keys instead.
3. Softmax is vertical, over keys: no step crosses lanes. The maximum falls out of step 2. The scale carries
   log2(e), so that each weight is one power of two; the division waits for step 4.
4. out[query, d] = sum of P[key, query] V[key, d] in register tiles of 8 queries (4 on narrow machines) by
   `col_tile` columns, then by halves of it where head_dim leaves a rest. Queries past the end are skipped.

With a window a task visits only the keys that some query of it sees, and those at the rim get -1e37 before their scores
are summed; everything else is the same, with the window's keys for the sequence. Its scratch is as small as that.

Tasks run head-major: a thread owns whole heads, which balances ragged batches, and the rows of the next sequence
follow those of this one, so steps 1 and 2 prefetch them. Without it short sequences wait for memory: the rows of a
head lie a full activation row apart, on other pages, where no hardware prefetcher follows. The parallel loop
runs over chunks of tasks because TVM allocates scratch (each register tile too) once per parallel iteration.

`attention_steps.py` puts the steps together: 1 is in `attention_queries.py`, 2 in `attention_scores.py`, 3 in
`attention_softmax.py`, 4 in `attention_weigh.py`.

Rejected by measurement (Zen 5): all heads of a tile in turn (10-25 % slower at 8-32 tokens, and unbalanced); the
probabilities in cache-sized key blocks (0-3 % slower at 512 keys); weighting tiles of 6 x 64 (3 % slower) and 16 x 16
(5 %); `vector_math.exp` (4 % slower at 512: softmax needs only 2^x, x <= 0).

Method: packed batches and per-sequence attention after ByteTransformer (arXiv 2210.03052), deferred division
after FlashAttention (arXiv 2205.14135), exp2 polynomial after Cephes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import Attention
from turbo_tvm.schedules.common.space import Knob, Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_form import Chunk, Form
from turbo_tvm.schedules.cpu.attention_steps import attend_task_macro
from turbo_tvm.schedules.cpu.attention_task import Heads, Operands, Span
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(_operator: Attention, tiles: CpuTiles) -> Space:
    """Return the decisions of this kernel."""
    weighed = 8 if tiles.tile_rows >= 8 else 4
    scored = tuple(sorted({tiles.row_tile, 2 * tiles.row_tile, tiles.tile_rows}))
    return Space(
        (
            Knob("chunks", (16, 48, 96, 192), 48, "parallel iterations: a multiple of the usual core counts"),
            Knob("score_keys", scored, tiles.tile_rows, "keys of a register tile of scores"),
            Knob("narrow_keys", (4, 8, 16), 8, "the same for few queries: one vector each, so as many FMA chains"),
            Knob(
                "weigh_queries", tuple(sorted({4, weighed})), weighed, "queries of a register tile of weighted values"
            ),
        )
    )


def attention(operator: Attention, tiles: CpuTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(q, k, v, query_tiles, [position_bias,] [key_table,] [query_table,] out)`: attention per sequence.

    q, k, v: `(t, R, width)`; they may be one buffer. query_tiles: int32 `(nq, 3)`; sequences have 1 .. max_length rows.
    With fewer heads of k and v, heads / kv_heads neighbouring heads of q share one. position_bias is added for query i,
    key j at column j - i + max_length - 1; key_table, query_table: see `distances.py`, for every head of q. q, k and v
    in bf16 make it products of bf16 numbers; head_dim, widths and first columns are then even. variants: settings of
    `space` by rows.
    """
    geometry, out_rows = Heads.of(operator), operator.out
    heads, max_length, in_pairs, in_type = geometry.heads, geometry.max_length, geometry.in_pairs, operator.q.dtype
    (q_width, _), (k_width, _), (v_width, _) = geometry.q, geometry.k, geometry.v
    choices = space(operator, tiles)
    attend = by_rows(variants, choices, tiles.row_tile, lambda setting: _attend_macro(Form(tiles, geometry, setting)))

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        q_arg: T.handle,
        k_arg: T.handle,
        v_arg: T.handle,
        query_tiles_arg: T.handle,
        bias_arg: T.handle,
        keys_arg: T.handle,
        queries_arg: T.handle,
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        nq = T.int64()
        q_in = T.match_buffer(q_arg, (t, tiles.row_tile, q_width), in_type)
        k_in = T.match_buffer(k_arg, (t, tiles.row_tile, k_width), in_type)
        v_in = T.match_buffer(v_arg, (t, tiles.row_tile, v_width), in_type)
        query_tiles = T.match_buffer(query_tiles_arg, (nq, 3), "int32")
        bias = T.match_buffer(bias_arg, (heads, 2 * max_length - 1), "float32")
        of_keys = T.match_buffer(keys_arg, (geometry.table_size,), geometry.pair_type)
        of_queries = T.match_buffer(queries_arg, (geometry.table_size,), geometry.pair_type)
        result = T.match_buffer(out_arg, (t, tiles.row_tile, out_rows.width), out_rows.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", bf16.DOT_LLVM if in_pairs else ""):
            operands = T.meta_var(Operands(q_in, k_in, v_in, query_tiles, result, bias, of_keys, of_queries))
            attend(t, operands)

    tables = {"bias": operator.position_bias, "of_keys": operator.key_table, "of_queries": operator.query_table}
    return without_parameters(kernel, [name for name, table in tables.items() if table is None])


def _attend_macro(form: Form) -> Macro:
    """`attend(t, operands)`: the whole strategy for a batch of t row tiles."""
    geometry, row_tile, chunks = form.geometry, form.tiles.row_tile, form.setting["chunks"]
    heads, step, pair_type = geometry.heads, geometry.step, geometry.pair_type
    do_task = _task_macro(form)

    @T.inline
    def attend(t, operands):
        nq = T.meta_var(operands.query_tiles.shape[0])
        for chunk in T.parallel(T.min(heads * nq, chunks)):
            with T.sblock("chunk"):
                T.reads()
                T.writes()
                q_seen = T.decl_buffer((t, row_tile, geometry.q[0] // step), pair_type, data=operands.q.data)
                k_seen = T.decl_buffer((t, row_tile, geometry.k[0] // step), pair_type, data=operands.k.data)
                values = T.sblock_alloc_buffer((form.scratch_pairs, form.value_columns), bf16.PAIR)
                seen = T.sblock_alloc_buffer((2,), "int64")
                start: T.let = chunk * (heads * nq) // T.min(heads * nq, chunks)
                stop: T.let = (chunk + 1) * (heads * nq) // T.min(heads * nq, chunks)
                seen_operands = T.meta_var(replace(operands, q=q_seen, k=k_seen))
                for i in range(stop - start):
                    do_task(Chunk(seen_operands, values, seen), start, i)

    return attend


def _task_macro(form: Form) -> Macro:
    """`do_task(chunk, start, i)`: task i of those of a chunk, the first of which is `start`: its head, its rows."""
    queries, window = form.tiles.query_tile, form.geometry.window
    attend_task = attend_task_macro(form)

    @T.inline
    def do_task(chunk, start, i):
        tiles = T.meta_var(chunk.operands.query_tiles)
        nq = T.meta_var(tiles.shape[0])
        # T.let, not an assignment: TVM gives a mutable scalar a workspace allocation of its own
        task: T.let = start + i
        first: T.let = T.cast(tiles[task % nq, 0], "int64")
        begin: T.let = T.cast(tiles[task % nq, 1], "int64")
        end: T.let = T.cast(tiles[task % nq, 2], "int64")
        last: T.let = T.min(end, first + queries)
        head: T.let = task // nq
        # through memory: the bounds of a window, spelt out, busy TVM's simplifier for half a minute
        chunk.seen[0] = begin if window is None else T.max(begin, first - window)
        chunk.seen[1] = end if window is None else T.min(end, last + window)
        first_key: T.let = chunk.seen[0]
        end_key: T.let = chunk.seen[1]
        # the first task of a sequence and head, or of the chunk; with a window each one has keys of its own
        fresh = T.meta_var(T.bitwise_or(first == begin, i == 0) if window is None else True)
        attend_task(chunk, head, Span(first, last, first_key, end_key), fresh)

    return do_task
