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

Rejected by measurement (Zen 5): all heads of a tile in turn (10-25 % slower at 8-32 tokens, and unbalanced); the
probabilities in cache-sized key blocks (0-3 % slower at 512 keys); weighting tiles of 6 x 64 (3 % slower) and 16 x 16
(5 %); `vector_math.exp` (4 % slower at 512: softmax needs only 2^x, x <= 0).

Method: packed batches and per-sequence attention after ByteTransformer (arXiv 2210.03052), deferred division
after FlashAttention (arXiv 2205.14135), exp2 polynomial after Cephes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_math import bf16_accumulate_macro, fp32_accumulate_macro, pair_values_macro, scores_macro, softmax_macro, weigh_macro
from turbo_tvm.schedules.cpu.attention_task import Distances, Macro, Rows, Task, load_bias_macro, load_queries_macro
from turbo_tvm.schedules.cpu.distances import add_distances_macro
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.common.space import Knob, Space, Variant, by_rows
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

_NARROW_LEFTOVER = 8  # keys that are left over, with one vector
_LEFTOVER_KEYS = 4  # with two vectors that is 8 FMA chains, just enough to hide their latency


@dataclass(frozen=True)
class Heads:
    """What a call works on: the geometry of heads, and what is added to scores. q, k, v: (width, first column)."""

    heads: int
    head_dim: int
    group: int
    scale: float
    max_length: int
    window: int | None
    q: tuple[int, int]
    k: tuple[int, int]
    v: tuple[int, int]
    in_pairs: bool = False
    position_bias: bool = False
    key_distances: bool = False
    query_distances: bool = False
    distance_width: int = 1

    @property
    def step(self) -> int:
        """Columns that an element of a panel holds."""
        return 2 if self.in_pairs else 1

    @property
    def table_size(self) -> int:
        """Elements of a table over distances."""
        return self.heads * (self.head_dim // self.step) * self.distance_width


@dataclass(frozen=True)
class Operands:
    """The buffers of a call; those that are not given are not looked at."""

    q: tvm.tirx.Buffer
    k: tvm.tirx.Buffer
    v: tvm.tirx.Buffer
    query_tiles: tvm.tirx.Buffer
    out: tvm.tirx.Buffer
    bias: tvm.tirx.Buffer | None = None
    of_keys: tvm.tirx.Buffer | None = None
    of_queries: tvm.tirx.Buffer | None = None


def space(tiles: CpuTiles, **_options: object) -> Space:
    """The decisions of this kernel."""
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


def attention(
    tiles: CpuTiles,
    *,
    heads: int,
    head_dim: int,
    scale: float,
    max_length: int,
    q: tuple[int, int],
    k: tuple[int, int],
    v: tuple[int, int],
    kv_heads: int | None = None,
    window: int | None = None,
    position_bias: bool = False,
    key_distances: bool = False,
    query_distances: bool = False,
    distance_width: int = 1,
    x: RowFormat | None = None,
    out: RowFormat | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(q, k, v, query_tiles, [position_bias,] [key_table,] [query_table,] out)`: the result per sequence and head.

    q, k, v: `(t, R, width)`, each given as (width, first column of head 0); they may be one buffer. query_tiles: int32
    `(nq, 3)`; sequences have 1 .. max_length rows. out: fp32 `(t, R, heads * head_dim)` unless the format says else.
    kv_heads: heads of k and v, if fewer: heads / kv_heads neighbouring heads of q share one. window: query i sees key j
    where |i - j| <= window. position_bias: fp32 `(heads, 2 * max_length - 1)`, added for query i, key j at column
    j - i + max_length - 1. key_distances, query_distances: whether there are the tables of `distances.py`, for every
    head of q; distance_width: their columns.
    x: the dtype of q, k and v, by default fp32; bf16 makes it products of bf16 numbers, and head_dim, widths and first
    columns are then even. variants: settings of `space` by rows.
    """
    out_rows = out or RowFormat(heads * head_dim)
    in_type = x.dtype if x is not None else "float32"
    in_pairs = in_type == bf16.STORAGE
    pair_type = bf16.PAIR if in_pairs else "float32"
    geometry = Heads(
        *(heads, head_dim, heads // (kv_heads or heads), scale, max_length, window, q, k, v, in_pairs, position_bias),
        *(key_distances, query_distances, distance_width),
    )
    attend = by_rows(variants, space(tiles), tiles.row_tile, lambda setting: _attend_macro(tiles, geometry, setting))

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
        q_in = T.match_buffer(q_arg, (t, tiles.row_tile, q[0]), in_type)
        k_in = T.match_buffer(k_arg, (t, tiles.row_tile, k[0]), in_type)
        v_in = T.match_buffer(v_arg, (t, tiles.row_tile, v[0]), in_type)
        query_tiles = T.match_buffer(query_tiles_arg, (nq, 3), "int32")
        bias = T.match_buffer(bias_arg, (heads, 2 * max_length - 1), "float32")
        of_keys = T.match_buffer(keys_arg, (geometry.table_size,), pair_type)
        of_queries = T.match_buffer(queries_arg, (geometry.table_size,), pair_type)
        result = T.match_buffer(out_arg, (t, tiles.row_tile, out_rows.width), out_rows.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", bf16.DOT_LLVM if in_pairs else ""):
            operands = T.meta_var(Operands(q_in, k_in, v_in, query_tiles, result, bias, of_keys, of_queries))
            attend(t, operands)

    given = {"bias": position_bias, "of_keys": key_distances, "of_queries": query_distances}
    return without_parameters(kernel, [name for name, is_given in given.items() if not is_given])


def _attend_macro(tiles: CpuTiles, geometry: Heads, setting: dict[str, int]) -> Macro:
    """`attend(t, operands)`: the whole strategy for a batch of t row tiles."""
    lanes, queries, row_tile = tiles.lanes, tiles.query_tile, tiles.row_tile
    heads, head_dim, group, window = geometry.heads, geometry.head_dim, geometry.group, geometry.window
    (q_width, q_column), (k_width, k_column), (_, v_column) = geometry.q, geometry.k, geometry.v
    max_length, scale, position_bias = geometry.max_length, geometry.scale, geometry.position_bias
    key_distances, query_distances = geometry.key_distances, geometry.query_distances
    distance_width, in_pairs, step = geometry.distance_width, geometry.in_pairs, geometry.step
    pair_type = bf16.PAIR if in_pairs else "float32"
    chunks, narrow_keys = setting["chunks"], setting["narrow_keys"]
    accumulate = bf16_accumulate_macro(lanes) if in_pairs else fp32_accumulate_macro()
    most_keys = max_length if window is None else min(max_length, queries + 2 * window)
    load_queries = load_queries_macro(lanes, queries, head_dim // step, pair_type)
    load_bias = load_bias_macro(queries, max_length, scale)
    pair_values = pair_values_macro(lanes, head_dim)
    disentangled = key_distances or query_distances
    add = add_distances_macro(lanes, key_distances, query_distances, in_pairs) if disentangled else None
    narrow_scores = scores_macro(
        lanes, narrow_keys, min(narrow_keys, _NARROW_LEFTOVER), position_bias, accumulate, window, add
    )
    wide_scores = scores_macro(queries, setting["score_keys"], _LEFTOVER_KEYS, position_bias, accumulate, window, add)
    narrow_softmax = softmax_macro(lanes, scale * math.log2(math.e), in_pairs)
    wide_softmax = softmax_macro(queries, scale * math.log2(math.e), in_pairs)
    weigh = weigh_macro(setting["weigh_queries"], lanes, tiles.col_tile, head_dim, in_pairs, accumulate)
    scratch_keys = most_keys + _NARROW_LEFTOVER  # a leftover tile ends less than its height past the last key
    diagonal_size = most_keys + queries if position_bias else 1
    scratch_pairs = (most_keys + 1) // 2 if in_pairs else 1
    value_columns = -(-head_dim // lanes) * lanes if in_pairs else 1

    def of_head(buffer: tvm.tirx.Buffer, head: Expr, column: int = 0) -> Rows:
        """The head's rows; in pairs if that is how the buffer looks at them."""
        per = 2 if str(buffer.dtype) == bf16.PAIR else 1
        return Rows(buffer, column // per + head * (head_dim // per), head_dim // per)

    def distances_of(of_keys: tvm.tirx.Buffer, of_queries: tvm.tirx.Buffer, head: Expr) -> Distances:
        origin = head * (head_dim // step * distance_width) + (max_length - 1)
        return Distances(of_keys, of_queries, origin, distance_width)

    @T.inline
    def attend_task(q_rows, k_rows, v_rows, o_rows, bias, distances, values, head, fresh, first, last, begin, end):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            panel = T.sblock_alloc_buffer((head_dim // step, queries), pair_type)
            weights = T.sblock_alloc_buffer((scratch_keys, queries), "float32")
            pairs = T.sblock_alloc_buffer((scratch_pairs, queries), bf16.PAIR)
            diagonal = T.sblock_alloc_buffer((diagonal_size,), "float32")
            peak = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            inverse = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            scratch = T.meta_var((panel, weights, pairs, values, peak, inverse, diagonal))
            task = T.meta_var(Task(first, last, begin, end, *scratch, distances))
            load_queries(task, q_rows, o_rows)
            if position_bias:
                load_bias(task, bias, head)
            if in_pairs:  # noqa: SIM102  the outer one is decided when the kernel is built
                if fresh:
                    pair_values(task, v_rows)
            if last - first <= lanes:
                narrow_scores(task, k_rows, v_rows)
                narrow_softmax(task)
            else:
                wide_scores(task, k_rows, v_rows)
                wide_softmax(task)
            weigh(task, v_rows, o_rows)

    @T.inline
    def attend(t, operands):
        nq = T.meta_var(operands.query_tiles.shape[0])
        for chunk in T.parallel(T.min(heads * nq, chunks)):
            with T.sblock("chunk"):
                T.reads()
                T.writes()
                q_seen = T.decl_buffer((t, row_tile, q_width // step), pair_type, data=operands.q.data)
                k_seen = T.decl_buffer((t, row_tile, k_width // step), pair_type, data=operands.k.data)
                values = T.sblock_alloc_buffer((scratch_pairs, value_columns), bf16.PAIR)
                seen = T.sblock_alloc_buffer((2,), "int64")
                start: T.let = chunk * (heads * nq) // T.min(heads * nq, chunks)
                stop: T.let = (chunk + 1) * (heads * nq) // T.min(heads * nq, chunks)
                for i in range(stop - start):
                    # T.let, not an assignment: TVM gives a mutable scalar a workspace allocation of its own
                    task: T.let = start + i
                    first: T.let = T.cast(operands.query_tiles[task % nq, 0], "int64")
                    begin: T.let = T.cast(operands.query_tiles[task % nq, 1], "int64")
                    end: T.let = T.cast(operands.query_tiles[task % nq, 2], "int64")
                    last: T.let = T.min(end, first + queries)
                    head: T.let = task // nq
                    # through memory: the bounds of a window, spelt out, busy TVM's simplifier for half a minute
                    seen[0] = begin if window is None else T.max(begin, first - window)
                    seen[1] = end if window is None else T.min(end, last + window)
                    first_key: T.let = seen[0]
                    end_key: T.let = seen[1]
                    attend_task(
                        of_head(q_seen, head, q_column),
                        of_head(k_seen, head // group, k_column),
                        of_head(operands.v, head // group, v_column),
                        of_head(operands.out, head),
                        operands.bias,
                        distances_of(operands.of_keys, operands.of_queries, head),
                        values,
                        head,
                        T.bitwise_or(first == begin, i == 0) if window is None else True,
                        first,
                        last,
                        first_key,
                        end_key,
                    )

    return attend
