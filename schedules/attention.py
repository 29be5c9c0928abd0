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
from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Shuffle

from turbo_tvm.schedules.script import CACHE_LINE_FLOATS, without_parameters
from turbo_tvm.schedules.tiles import CpuTiles

Macro = Callable[..., None]

_CHUNKS = 48  # parallel iterations: a multiple of the usual core counts
_LEFTOVER_KEYS = 4  # with two vectors that is 8 FMA chains, just enough to hide their latency
_NARROW_KEYS = 8  # the same 8 chains with one vector
_EXP2 = (1.5353362e-4, 1.3398874e-3, 9.6184374e-3, 5.5503325e-2, 2.4022648e-1, 6.9314720e-1, 1.0)
_LOWEST = -1e38  # stands for -infinity: differences of such scores stay finite


@dataclass(frozen=True)
class _Rows:
    """The columns of one head in an activation buffer, addressed by packed row."""

    buffer: tvm.tirx.Buffer
    first_column: Expr
    head_dim: int

    def index(self, row: Expr, column: Expr) -> tuple[Expr, Expr, Expr]:
        """Where an element of the head lies in the buffer."""
        tile = self.buffer.shape[1]
        return row // tile, row % tile, self.first_column + column

    def at(self, row: Expr, column: Expr) -> Expr:
        """An element of the head."""
        return self.buffer[self.index(row, column)]

    @property
    def cache_lines(self) -> int:
        """How many lines a row of the head covers."""
        return -(-self.head_dim // CACHE_LINE_FLOATS)

    def prefetch(self, row: Expr, line: Expr, write: bool = False) -> Expr:
        """Bring a line of a row into L1; the last row stands for those past the buffer."""
        row = T.min(row, self.buffer.shape[0] * self.buffer.shape[1] - 1)
        address = T.address_of(self.at(row, line * CACHE_LINE_FLOATS))
        flags = (T.int32(int(write)), T.int32(3), T.int32(1))
        return T.evaluate(tvm.tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, *flags))


@dataclass(frozen=True)
class _Task:
    """Queries [first, last) against the keys [begin, end), and the scratch: see the strategy."""

    first: Expr
    last: Expr
    begin: Expr
    end: Expr
    panel: tvm.tirx.Buffer
    weights: tvm.tirx.Buffer
    diagonal: tvm.tirx.Buffer
    peak: tvm.tirx.Buffer
    inverse: tvm.tirx.Buffer

    @property
    def queries(self) -> Expr:
        """Number of queries."""
        return self.last - self.first

    @property
    def keys(self) -> Expr:
        """Number of keys."""
        return self.end - self.begin


def _exp2(x: Expr) -> Expr:
    """2^x for x <= 0, relative error 2e-7; exactly 0 from -126.5 down. Adding `shift` rounds, as in `vector_math.exp`.

    The integer goes through `reinterpret` twice because TVM would simplify x - ((x + shift) - shift) to 0.
    """
    shift = T.float32(1.5 * 2**23 + 127)
    x = T.max(x, T.float32(-127))
    shifted = T.reinterpret(str(x.ty).replace("float", "int"), x + shift)
    r = x - (T.reinterpret(x.ty, shifted) - shift)
    total = T.float32(_EXP2[0])
    for coefficient in _EXP2[1:]:
        total = total * r + T.float32(coefficient)
    return total * T.reinterpret(x.ty, T.shift_left(shifted, T.int32(23)))


def _transpose(lanes: int) -> Macro:
    """`transpose(a, b)` transposes the block `(lanes, lanes)` in `a`, by exchanges at distance lanes / 2 ... 1.

    The result is in `b` when log2(lanes) is odd, else in `a`.
    """

    def mix(a: tvm.tirx.Buffer, row: Expr, distance: int, upper: bool) -> Expr:
        pick = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        if upper:
            pick = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        return Shuffle([a[row, T.ramp(0, 1, lanes)], a[row + distance, T.ramp(0, 1, lanes)]], pick)

    @T.inline
    def exchange(a, b, distance, again):
        for i in T.unroll(lanes // 2):
            row = T.meta_var(i // distance * distance * 2 + i % distance)
            b[row, T.ramp(0, 1, lanes)] = mix(a, row, distance, False)
            b[row + distance, T.ramp(0, 1, lanes)] = mix(a, row, distance, True)
        if distance > 1:
            again(b, a, distance // 2, again)

    @T.inline
    def transpose(a, b):
        exchange(a, b, lanes // 2, exchange)

    return transpose


def _load_queries(lanes: int, queries: int, head_dim: int, scale: float) -> Macro:
    """`load_queries(task, q, out)`: step 1. Lanes past the last query repeat it."""
    transpose, swapped = _transpose(lanes), lanes.bit_length() % 2 == 0
    whole = head_dim // lanes * lanes

    @T.inline
    def prefetch_next(task, q, out):
        for i in range(task.queries):
            for line in T.unroll(q.cache_lines):
                q.prefetch(task.last + i, line)
                out.prefetch(task.last + i, line, True)

    @T.inline
    def load_queries(task, q, out):
        prefetch_next(task, q, out)
        for block, group in T.grid(head_dim // lanes, (task.queries + lanes - 1) // lanes):
            with T.sblock("transpose"):
                T.reads()
                T.writes()
                a = T.sblock_alloc_buffer((lanes, lanes), "float32", scope="local")
                b = T.sblock_alloc_buffer((lanes, lanes), "float32", scope="local")
                for i in T.unroll(lanes):
                    row = T.meta_var(T.min(task.first + group * lanes + i, task.last - 1))
                    for j in T.vectorized(lanes):
                        a[i, j] = q.at(row, block * lanes + j) * T.float32(scale)
                transpose(a, b)
                done = T.meta_var(b if swapped else a)
                for i in T.unroll(lanes):
                    for j in T.vectorized(lanes):
                        task.panel[block * lanes + i, group * lanes + j] = done[i, j]
        for d, j in T.grid(head_dim - whole, queries):
            task.panel[whole + d, j] = q.at(T.min(task.first + j, task.last - 1), whole + d) * T.float32(scale)

    return load_queries


def _load_bias(queries: int, max_length: int) -> Macro:
    """`load_bias(task, bias, head)`: the bias of query lane i, key j goes to diagonal[keys - 1 - j + i].

    Reversed on the way in, so that the lanes of a score tile read it forwards. Lanes past the sequence may lie before
    the table: they read its first element.
    """

    @T.inline
    def load_bias(task, bias, head):
        for i in range(task.keys + queries - 1):
            column = T.meta_var(T.max(max_length - 1 + (task.end - 1 - task.first) - i, 0))
            task.diagonal[i] = T.max(bias[head, column] * T.float32(math.log2(math.e)), T.float32(_LOWEST))

    return load_bias


def _scores(width: int, key_tile: int, leftover: int, position_bias: bool) -> Macro:
    """`scores(task, k, v)`: step 2 for `width` queries: scores into weights[key, query], their maximum into peak."""

    def initial(task: _Task, key: Expr, lane: Expr) -> Expr:
        return task.diagonal[task.keys - 1 - key + lane] if position_bias else T.float32(0)

    @T.inline
    def prefetch_next(task, k, v, key, keys):
        if task.last == task.end:
            for i in range(keys):
                for line in T.unroll(k.cache_lines):
                    k.prefetch(task.end + key + i, line)
                    v.prefetch(task.end + key + i, line)

    @T.inline
    def tile(task, k, first, keys, key_of):
        with T.sblock("scores"):
            T.reads()
            T.writes()
            acc = T.sblock_alloc_buffer((keys, width), "float32", scope="local")
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    acc[i, j] = initial(task, key_of(task, first + i), j)
            for d in range(k.head_dim):
                for i in T.unroll(keys):
                    for j in T.vectorized(width):
                        acc[i, j] += k.at(task.begin + key_of(task, first + i), d) * task.panel[d, j]
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    task.weights[first + i, j] = acc[i, j]
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    task.peak[j] = T.max(task.peak[j], acc[i, j])

    def same(task: _Task, key: Expr) -> Expr:
        return key

    def last_repeated(task: _Task, key: Expr) -> Expr:
        return T.min(key, task.keys - 1)

    @T.inline
    def scores(task, k, v):
        for j in T.vectorized(width):
            task.peak[j] = T.float32(3 * _LOWEST)
        for i in range(task.keys // key_tile):
            prefetch_next(task, k, v, i * key_tile, key_tile)
            tile(task, k, i * key_tile, key_tile, same)
        for i in range((task.keys % key_tile + leftover - 1) // leftover):
            key: T.let = task.keys // key_tile * key_tile + i * leftover
            prefetch_next(task, k, v, key, leftover)
            tile(task, k, key, leftover, last_repeated)

    return scores


def _softmax(width: int) -> Macro:
    """`softmax(task)`: step 3: weights become 2^(score - peak), inverse 1 / their sum."""

    @T.inline
    def row(task, key):
        for j in T.vectorized(width):
            task.weights[key, j] = _exp2(task.weights[key, j] - task.peak[j])
        for j in T.vectorized(width):
            task.inverse[j] += task.weights[key, j]

    @T.inline
    def softmax(task):
        for j in T.vectorized(width):
            task.inverse[j] = T.float32(0)
        for block in range(task.keys // 4):
            for i in T.unroll(4):
                row(task, block * 4 + i)
        for i in range(task.keys % 4):
            row(task, task.keys // 4 * 4 + i)
        for j in T.vectorized(width):
            task.inverse[j] = T.float32(1) / task.inverse[j]

    return softmax


def _weigh(group: int, col_tile: int, head_dim: int) -> Macro:
    """`weigh(task, v, out)`: step 4, in tiles of `group` queries by `col_tile` columns, a half of it, a quarter ..."""

    @T.inline
    def columns(task, v, out, column, width):
        for block in range((task.queries + group - 1) // group):
            with T.sblock("weigh"):
                T.reads()
                T.writes()
                acc = T.sblock_alloc_buffer((group, width), "float32", scope="local")
                for i in T.unroll(group):
                    for j in T.vectorized(width):
                        acc[i, j] = T.float32(0)
                for key in range(task.keys):
                    for i in T.unroll(group):
                        for j in T.vectorized(width):
                            acc[i, j] += task.weights[key, block * group + i] * v.at(task.begin + key, column + j)
                for i in T.unroll(group):
                    row = T.meta_var(task.first + block * group + i)
                    if row < task.last:
                        for j in T.vectorized(width):
                            out.buffer[out.index(row, column + j)] = acc[i, j] * task.inverse[block * group + i]

    @T.inline
    def rest(task, v, out, width, again):
        if head_dim & width > 0:
            columns(task, v, out, head_dim // (2 * width) * (2 * width), width)
        if width > 1:
            again(task, v, out, width // 2, again)

    @T.inline
    def weigh(task, v, out):
        for block in range(head_dim // col_tile):
            columns(task, v, out, block * col_tile, col_tile)
        rest(task, v, out, col_tile // 2, rest)

    return weigh


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
    position_bias: bool = False,
) -> tvm.tirx.PrimFunc:
    """`(q, k, v, query_tiles, [position_bias,] out)`: out = softmax(scale Q K^T [+ bias]) V per sequence and head.

    q, k, v: fp32 `(t, R, width)`, each given as (width, first column of head 0); they may be one buffer.
    query_tiles: int32 `(nq, 3)`; sequences have 1 .. max_length rows. out: fp32 `(t, R, heads * head_dim)`.
    position_bias: fp32 `(heads, 2 * max_length - 1)`, added for query i, key j at column j - i + max_length - 1.
    """
    lanes, queries, row_tile = tiles.lanes, tiles.query_tile, tiles.row_tile
    (q_width, q_column), (k_width, k_column), (v_width, v_column) = q, k, v
    load_queries = _load_queries(lanes, queries, head_dim, scale * math.log2(math.e))
    load_bias = _load_bias(queries, max_length)
    narrow_scores = _scores(lanes, _NARROW_KEYS, _NARROW_KEYS, position_bias)
    wide_scores = _scores(queries, row_tile, _LEFTOVER_KEYS, position_bias)
    narrow_softmax, wide_softmax = _softmax(lanes), _softmax(queries)
    weigh = _weigh(8 if row_tile >= 8 else 4, tiles.col_tile, head_dim)
    scratch_keys = max_length + _NARROW_KEYS  # a leftover tile ends less than its height past the last key
    diagonal_size = max_length + queries if position_bias else 1

    def of_head(buffer: tvm.tirx.Buffer, head: Expr, column: int = 0) -> _Rows:
        return _Rows(buffer, column + head * head_dim, head_dim)

    @T.inline
    def attend(q_rows, k_rows, v_rows, out_rows, bias, head, first, last, begin, end):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            panel = T.sblock_alloc_buffer((head_dim, queries), "float32")
            weights = T.sblock_alloc_buffer((scratch_keys, queries), "float32")
            diagonal = T.sblock_alloc_buffer((diagonal_size,), "float32")
            peak = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            inverse = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            task = T.meta_var(_Task(first, last, begin, end, panel, weights, diagonal, peak, inverse))
            load_queries(task, q_rows, out_rows)
            if position_bias:
                load_bias(task, bias, head)
            if last - first <= lanes:
                narrow_scores(task, k_rows, v_rows)
                narrow_softmax(task)
            else:
                wide_scores(task, k_rows, v_rows)
                wide_softmax(task)
            weigh(task, v_rows, out_rows)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        q_arg: T.handle,
        k_arg: T.handle,
        v_arg: T.handle,
        query_tiles_arg: T.handle,
        bias_arg: T.handle,
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        nq = T.int64()
        q_in = T.match_buffer(q_arg, (t, row_tile, q_width), "float32")
        k_in = T.match_buffer(k_arg, (t, row_tile, k_width), "float32")
        v_in = T.match_buffer(v_arg, (t, row_tile, v_width), "float32")
        query_tiles = T.match_buffer(query_tiles_arg, (nq, 3), "int32")
        bias = T.match_buffer(bias_arg, (heads, 2 * max_length - 1), "float32")
        out = T.match_buffer(out_arg, (t, row_tile, heads * head_dim), "float32")
        for chunk in T.parallel(T.min(heads * nq, _CHUNKS)):
            with T.sblock("chunk"):
                T.reads()
                T.writes()
                start: T.let = chunk * (heads * nq) // T.min(heads * nq, _CHUNKS)
                stop: T.let = (chunk + 1) * (heads * nq) // T.min(heads * nq, _CHUNKS)
                for i in range(stop - start):
                    # T.let, not an assignment: TVM gives a mutable scalar a workspace allocation of its own
                    task: T.let = start + i
                    first: T.let = T.cast(query_tiles[task % nq, 0], "int64")
                    begin: T.let = T.cast(query_tiles[task % nq, 1], "int64")
                    end: T.let = T.cast(query_tiles[task % nq, 2], "int64")
                    last: T.let = T.min(end, first + queries)
                    head: T.let = task // nq
                    attend(
                        of_head(q_in, head, q_column),
                        of_head(k_in, head, k_column),
                        of_head(v_in, head, v_column),
                        of_head(out, head),
                        bias,
                        head,
                        first,
                        last,
                        begin,
                        end,
                    )

    return kernel if position_bias else without_parameters(kernel, ["bias"])
