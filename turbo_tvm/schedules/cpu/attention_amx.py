"""Attention in bf16 on CPUs with Intel AMX: `schedules/attention.py` with tile instructions.

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

A tile of at most 16 queries does without the right half. Surplus queries repeat the last one.

Measured (Granite Rapids, 12 heads of 64, 2 threads, alternating with `attention.py` in bf16): 4.8 times as fast at 512
tokens (1,020 GFLOP/s), 4.0 at 4 x 128, 2.2 at 8 x 32; but 0.7 times at 8 x 8, for blocks of 32 are mostly empty there.

Rejected: scores the other way round, S[query, key]. Nothing is transposed per task then, but softmax reduces across
lanes twice for every query, and keys that fill up a block need a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.attention import Heads, Operands
from turbo_tvm.schedules.cpu.attention_math import in_window, softmax_macro
from turbo_tvm.schedules.cpu.attention_task import LOWEST, Macro, Rows, Task, load_queries_macro, transpose_macro
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.common.space import Knob, Space, Variant, by_rows
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

_QUERIES, _KEYS = 2 * amx.PAIRS, 2 * amx.ROWS
_LANES = amx.PAIRS
_STEP = 2 * amx.PAIRS  # what a product sums over
_LINE_PAIRS = 16  # a cache line

# A task: its number, up to _STOP; its head and its row of `query_tiles`, and what that holds. In memory, because nested
# `T.let`s of such arithmetic keep TVM's simplifier busy for seconds.
_TASK, _STOP, _HEAD, _ROW, _FIRST, _LAST, _BEGIN, _END = range(8)
_PLACES = 8


def fits(head_dim: int, x_dtype: str, out_dtype: str) -> bool:
    """Whether this kernel handles such heads and formats; it knows no biases and no tables over distances."""
    return head_dim % _STEP == 0 and x_dtype == out_dtype == bf16.STORAGE


def space(_tiles: CpuTiles, **_options: object) -> Space:
    """The decisions of this kernel."""
    return Space(
        (
            Knob("chunks", (16, 48, 96, 192), 48, "parallel iterations: a multiple of the usual core counts"),
            Knob("fetch", (0, 1), 0, "whether the next sequence's keys and values are asked for beside the scores"),
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
    x: RowFormat,
    out: RowFormat,
    instructions: str = amx.LLVM,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(q, k, v, query_tiles, out)`, as `attention.attention`; all rows in bf16.

    instructions: LLVM IR that defines the functions of `schedules/amx.py`. variants: settings of `space` by rows.
    """
    if not fits(head_dim, x.dtype, out.dtype) or tiles.query_tile != _QUERIES:
        raise ValueError(f"heads of {head_dim} from {x.dtype} to {out.dtype} do not fit AMX: multiples of 32, in bf16")
    geometry = Heads(heads, head_dim, heads // (kv_heads or heads), scale, max_length, window, q, k, v)
    attend = by_rows(variants, space(tiles), tiles.row_tile, lambda setting: _attend_macro(tiles, geometry, setting))

    @T.prim_func(private=True, s_tir=True)
    def kernel(q_arg: T.handle, k_arg: T.handle, v_arg: T.handle, query_tiles_arg: T.handle, out_arg: T.handle):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        nq = T.int64()
        q_in = T.match_buffer(q_arg, (t, tiles.row_tile, q[0]), x.dtype)
        k_in = T.match_buffer(k_arg, (t, tiles.row_tile, k[0]), x.dtype)
        v_in = T.match_buffer(v_arg, (t, tiles.row_tile, v[0]), x.dtype)
        query_tiles = T.match_buffer(query_tiles_arg, (nq, 3), "int32")
        result = T.match_buffer(out_arg, (t, tiles.row_tile, out.width), out.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", instructions):
            operands = T.meta_var(Operands(q_in, k_in, v_in, query_tiles, result))
            attend(t, operands)

    return kernel


def _attend_macro(tiles: CpuTiles, geometry: Heads, setting: dict[str, int]) -> Macro:
    """`attend(t, operands)`: the whole strategy for a batch of t row tiles."""
    heads, head_dim, group, window = geometry.heads, geometry.head_dim, geometry.group, geometry.window
    chunks, fetch = setting["chunks"], bool(setting["fetch"]) and window is None
    row_tile, pairs_of_head = tiles.row_tile, head_dim // 2
    (q_width, q_column), (k_width, k_column), (v_width, v_column) = geometry.q, geometry.k, geometry.v
    seen_keys = geometry.max_length if window is None else min(geometry.max_length, _QUERIES + 2 * window)
    most_keys = -(-seen_keys // _KEYS) * _KEYS
    value_width = most_keys // 2 + _LINE_PAIRS  # not a power of two: the rows of a tile fall into different sets of L1
    load_queries = load_queries_macro(_LANES, _QUERIES, pairs_of_head, bf16.PAIR)
    softmax = softmax_macro(_QUERIES, geometry.scale * math.log2(math.e), True)
    narrow_softmax = softmax_macro(_LANES, geometry.scale * math.log2(math.e), True)
    copy_keys, turn_values = _copy_keys_macro(), _turn_values_macro(value_width)
    find_peak, clear_rest, store_rows = _find_peak_macro(window), _clear_rest_macro(), _store_rows_macro(head_dim)

    def of_head(buffer: tvm.tirx.Buffer, head: Expr, column: int = 0) -> Rows:
        return Rows(buffer, column // 2 + head * pairs_of_head, pairs_of_head)

    @T.inline
    def clear(both):
        amx.zero(0)
        amx.zero(2)
        if both:
            amx.zero(1)
            amx.zero(3)

    @T.inline
    def multiply(both, left, left_at, left_stride, right, right_at):
        amx.load(6, right, right_at, _QUERIES)
        amx.load(4, left, left_at, left_stride)
        amx.dot(0, 4, 6)
        amx.load(5, left, left_at + amx.ROWS * left_stride, left_stride)
        amx.dot(2, 5, 6)
        if both:
            amx.load(7, right, right_at + amx.PAIRS, _QUERIES)
            amx.dot(1, 4, 7)
            amx.dot(3, 5, 7)

    @T.inline
    def save(both, out, row):
        amx.store(0, out, row * _QUERIES, _QUERIES)
        amx.store(2, out, (row + amx.ROWS) * _QUERIES, _QUERIES)
        if both:
            amx.store(1, out, row * _QUERIES + amx.PAIRS, _QUERIES)
            amx.store(3, out, (row + amx.ROWS) * _QUERIES + amx.PAIRS, _QUERIES)

    @T.inline
    def fetch_next(task, k_rows, v_rows, block):
        if task.last == task.end:
            for i in range(_KEYS):
                for line in T.unroll(k_rows.cache_lines):
                    k_rows.prefetch(task.end + block * _KEYS + i, line)
                    v_rows.prefetch(task.end + block * _KEYS + i, line)

    @T.inline
    def scores(both, task, keys, k_rows, v_rows):
        for block in range((task.keys + _KEYS - 1) // _KEYS):
            if fetch:
                fetch_next(task, k_rows, v_rows, block)
            clear(both)
            for i in T.unroll(head_dim // _STEP):
                multiply(
                    both,
                    keys,
                    block * (_KEYS * pairs_of_head) + i * amx.PAIRS,
                    pairs_of_head,
                    task.panel,
                    i * amx.PAIRS * _QUERIES,
                )
            save(both, task.weights, block * _KEYS)

    @T.inline
    def weigh(both, task, turned):
        for block in T.unroll(head_dim // _STEP):
            clear(both)
            for i in range((task.keys + _STEP - 1) // _STEP):
                multiply(
                    both,
                    task.values,
                    block * (_STEP * value_width) + i * amx.PAIRS,
                    value_width,
                    task.pairs,
                    i * amx.PAIRS * _QUERIES,
                )
            save(both, turned, block * _STEP)

    @T.inline
    def attend_task(q_rows, k_rows, v_rows, o_rows, keys, values, place):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            panel = T.sblock_alloc_buffer((pairs_of_head, _QUERIES), bf16.PAIR)
            weights = T.sblock_alloc_buffer((most_keys, _QUERIES), "float32")
            pairs = T.sblock_alloc_buffer((most_keys // 2, _QUERIES), bf16.PAIR)
            turned = T.sblock_alloc_buffer((head_dim, _QUERIES), "float32")
            peak = T.sblock_alloc_buffer((_QUERIES,), "float32", scope="local")
            inverse = T.sblock_alloc_buffer((_QUERIES,), "float32", scope="local")
            bounds = T.meta_var((place[_FIRST], place[_LAST], place[_BEGIN], place[_END]))
            task = T.meta_var(Task(*bounds, panel, weights, pairs, values, peak, inverse))
            load_queries(task, q_rows, o_rows)
            if task.queries <= _LANES:
                scores(False, task, keys, k_rows, v_rows)
                find_peak(_LANES, task)
                narrow_softmax(task)
                clear_rest(_LANES, task)
                weigh(False, task, turned)
            else:
                scores(True, task, keys, k_rows, v_rows)
                find_peak(_QUERIES, task)
                softmax(task)
                clear_rest(_QUERIES, task)
                weigh(True, task, turned)
            store_rows(task, turned, o_rows)

    @T.inline
    def attend(t, operands):
        nq = T.meta_var(operands.query_tiles.shape[0])
        for chunk in T.parallel(T.min(heads * nq, chunks)):
            with T.sblock("chunk"):
                T.reads()
                T.writes()
                q_seen = T.decl_buffer((t, row_tile, q_width // 2), bf16.PAIR, data=operands.q.data)
                k_seen = T.decl_buffer((t, row_tile, k_width // 2), bf16.PAIR, data=operands.k.data)
                v_seen = T.decl_buffer((t, row_tile, v_width // 2), bf16.PAIR, data=operands.v.data)
                out_seen = T.decl_buffer((t, row_tile, operands.out.shape[2] // 2), bf16.PAIR, data=operands.out.data)
                keys = T.sblock_alloc_buffer((most_keys, pairs_of_head), bf16.PAIR)
                values = T.sblock_alloc_buffer((head_dim, value_width), bf16.PAIR)
                shapes = T.sblock_alloc_buffer((8,), "int64")
                place = T.sblock_alloc_buffer((_PLACES,), "int64")
                amx.configure(shapes, T.int64(amx.ROWS), T.int64(amx.ROWS), T.int64(amx.PAIRS))
                place[_TASK] = chunk * (heads * nq) // T.min(heads * nq, chunks)
                place[_STOP] = (chunk + 1) * (heads * nq) // T.min(heads * nq, chunks)
                for i in range(place[_STOP] - place[_TASK]):
                    place[_HEAD] = place[_TASK] // nq
                    place[_ROW] = place[_TASK] - place[_HEAD] * nq
                    place[_FIRST] = T.cast(operands.query_tiles[place[_ROW], 0], "int64")
                    place[_BEGIN] = T.cast(operands.query_tiles[place[_ROW], 1], "int64")
                    place[_END] = T.cast(operands.query_tiles[place[_ROW], 2], "int64")
                    place[_LAST] = T.min(place[_END], place[_FIRST] + _QUERIES)
                    if window is not None:
                        place[_BEGIN] = T.max(place[_BEGIN], place[_FIRST] - window)
                        place[_END] = T.min(place[_END], place[_LAST] + window)
                    k_rows = T.meta_var(of_head(k_seen, place[_HEAD] // group, k_column))
                    v_rows = T.meta_var(of_head(v_seen, place[_HEAD] // group, v_column))
                    if True if window is not None else T.bitwise_or(place[_FIRST] == place[_BEGIN], i == 0):
                        copy_keys(k_rows, keys, place[_BEGIN], place[_END])
                        turn_values(v_rows, values, place[_BEGIN], place[_END])
                    attend_task(
                        of_head(q_seen, place[_HEAD], q_column),
                        k_rows,
                        v_rows,
                        of_head(out_seen, place[_HEAD]),
                        keys,
                        values,
                        place,
                    )
                    place[_TASK] = place[_TASK] + 1
                amx.release()

    return attend


def _copy_keys_macro() -> Macro:
    """`copy_keys(k, keys, begin, end)`: the first half of step 1; rows that fill up a block repeat the last one."""

    @T.inline
    def copy_keys(k, keys, begin, end):
        for key in range((end - begin + _KEYS - 1) // _KEYS * _KEYS):
            for block in T.unroll(k.head_dim // _LANES):
                for j in T.vectorized(_LANES):
                    keys[key, block * _LANES + j] = k.at(T.min(begin + key, end - 1), block * _LANES + j)

    return copy_keys


def _turn_values_macro(width: int) -> Macro:
    """`turn_values(v, values, begin, end)`: the second half: values[d, i] is the pair of keys 2i and 2i + 1."""
    transpose = transpose_macro(_LANES)

    def paired(odd: bool, first: Expr, second: Expr) -> Expr:
        """Of two pairs, the odd halves or the even ones, side by side."""
        if odd:
            half = T.reinterpret("int32", T.shift_right(T.reinterpret("uint32", first), T.uint32(16)))
            return T.bitwise_or(half, T.bitwise_and(second, T.int32(-65536)))
        return T.bitwise_or(T.bitwise_and(first, T.int32(0xFFFF)), T.shift_left(second, T.int32(16)))

    @T.inline
    def turn(odd, v, values, begin, end, key, column):
        with T.sblock("transpose"):
            T.reads()
            T.writes()
            a = T.sblock_alloc_buffer((_LANES, _LANES), bf16.PAIR, scope="local")
            b = T.sblock_alloc_buffer((_LANES, _LANES), bf16.PAIR, scope="local")
            for i in T.unroll(_LANES):
                for j in T.vectorized(_LANES):
                    a[i, j] = paired(
                        odd,
                        v.at(T.min(begin + key + 2 * i, end - 1), column + j),
                        v.at(T.min(begin + key + 2 * i + 1, end - 1), column + j),
                    )
            transpose(a, b)
            for i in T.unroll(_LANES):
                for j in T.vectorized(_LANES):
                    values[2 * (column + i) + int(odd), key // 2 + j] = a[i, j]

    @T.inline
    def turn_values(v, values, begin, end):
        for block, part in T.grid((end - begin + _KEYS - 1) // _KEYS, v.head_dim // _LANES):
            turn(False, v, values, begin, end, block * _KEYS, part * _LANES)
            turn(True, v, values, begin, end, block * _KEYS, part * _LANES)

    return turn_values


def _find_peak_macro(window: int | None) -> Macro:
    """`find_peak(width, task)`: the greatest score of each query; scores outside of its window are masked."""

    @T.inline
    def find_peak(width, task):
        for j in T.vectorized(width):
            task.peak[j] = T.float32(3 * LOWEST)
        for key in range(task.keys):
            if window is not None:
                for j in T.vectorized(width):
                    task.weights[key, j] = in_window(task, key, j, window, task.weights[key, j])
            for j in T.vectorized(width):
                task.peak[j] = T.max(task.peak[j], task.weights[key, j])

    return find_peak


def _clear_rest_macro() -> Macro:
    """`clear_rest(width, task)`: weights of 0 for the keys that fill up the last block."""

    @T.inline
    def clear_rest(width, task):
        used = T.meta_var((task.keys + 1) // 2)
        for i in range((task.keys + _STEP - 1) // _STEP * amx.PAIRS - used):
            for j in T.vectorized(width):
                task.pairs[used + i, j] = 0

    return clear_rest


def _store_rows_macro(head_dim: int) -> Macro:
    """`store_rows(task, turned, out)`: the second half of step 4."""
    transpose = transpose_macro(_LANES)

    @T.inline
    def store_rows(task, turned, out):
        for block, group in T.grid(head_dim // _STEP, (task.queries + _LANES - 1) // _LANES):
            with T.sblock("transpose"):
                T.reads()
                T.writes()
                a = T.sblock_alloc_buffer((_LANES, _LANES), bf16.PAIR, scope="local")
                b = T.sblock_alloc_buffer((_LANES, _LANES), bf16.PAIR, scope="local")
                for i in T.unroll(_LANES):
                    for j in T.vectorized(_LANES):
                        a[i, j] = bf16.pair_half_up(
                            turned[block * _STEP + 2 * i, group * _LANES + j] * task.inverse[group * _LANES + j],
                            turned[block * _STEP + 2 * i + 1, group * _LANES + j] * task.inverse[group * _LANES + j],
                        )
                transpose(a, b)
                for i in T.unroll(_LANES):
                    if group * _LANES + i < task.queries:
                        for j in T.vectorized(_LANES):
                            out.buffer[out.index(task.first + group * _LANES + i, block * amx.PAIRS + j)] = a[i, j]

    return store_rows
