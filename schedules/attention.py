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

Rejected by measurement (Zen 5): all heads of a tile in turn (20-40 % slower below 64 tokens, and unbalanced); the
probabilities in cache-sized key blocks (0-3 % slower at 512 keys); weighting tiles of 6 x 64 (3 % slower) and 16 x 16
(6 %); `vector_math.exp` (7 % slower at 512: it keeps e^x exact where softmax needs only 2^x, x <= 0).

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
class _Operand:
    """A head's columns inside an activation buffer."""

    tiles: CpuTiles
    head_dim: int
    offset: int

    def at(self, buffer: tvm.tirx.Buffer, row: Expr, head: Expr, column: Expr) -> Expr:
        """The element of that packed row and head."""
        rows = self.tiles.row_tile
        return buffer[row // rows, row % rows, self.offset + head * self.head_dim + column]

    def prefetch(
        self, buffer: tvm.tirx.Buffer, row: Expr, head: Expr, line: Expr, write: bool = False
    ) -> Expr:
        """Bring a cache line of that row and head into L1."""
        address = T.address_of(self.at(buffer, row, head, line * CACHE_LINE_FLOATS))
        flags = (T.int32(int(write)), T.int32(3), T.int32(1))
        return tvm.tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, *flags)

    @property
    def cache_lines(self) -> int:
        """How many lines a row of the head covers."""
        return -(-self.head_dim // CACHE_LINE_FLOATS)


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


def _load_queries(tiles: CpuTiles, q: _Operand, out: _Operand, scale: float) -> Macro:
    """`load_queries(panel, q, out, first, last, head, rows)`: step 1. Lanes past the last query repeat it."""
    lanes, head_dim = tiles.lanes, q.head_dim
    blocked = head_dim // lanes * lanes
    transpose, swapped = _transpose(lanes), lanes.bit_length() % 2 == 0

    @T.inline
    def load_queries(panel, q_in, out_buffer, first, last, head, rows):
        for row in range(last - first):
            for line in T.unroll(q.cache_lines):
                T.evaluate(q.prefetch(q_in, T.min(last + row, rows - 1), head, line))
                T.evaluate(out.prefetch(out_buffer, T.min(last + row, rows - 1), head, line, True))
        for block in range(head_dim // lanes):
            for group in range((last - first + lanes - 1) // lanes):
                with T.sblock("transpose"):
                    T.reads()
                    T.writes()
                    a = T.sblock_alloc_buffer((lanes, lanes), "float32", scope="local")
                    b = T.sblock_alloc_buffer((lanes, lanes), "float32", scope="local")
                    for i in T.unroll(lanes):
                        for j in T.vectorized(lanes):
                            a[i, j] = q.at(
                                q_in, T.min(first + group * lanes + i, last - 1), head, block * lanes + j
                            ) * T.float32(scale)
                    transpose(a, b)
                    done = T.meta_var(b if swapped else a)
                    for i in T.unroll(lanes):
                        for j in T.vectorized(lanes):
                            panel[block * lanes + i, group * lanes + j] = done[i, j]
        for tail in range(head_dim - blocked):
            for j in range(tiles.query_tile):
                panel[blocked + tail, j] = q.at(
                    q_in, T.min(first + j, last - 1), head, blocked + tail
                ) * T.float32(scale)

    return load_queries


def _load_bias(tiles: CpuTiles, max_length: int) -> Macro:
    """`load_bias(diagonal, bias, first, end, head)`: the bias of query lane i, key j at [end - 1 - j + i].

    Reversed on the way in, so that the lanes of a score tile read it forwards. Lanes past the sequence may lie before
    the table: they read its first element.
    """

    @T.inline
    def load_bias(diagonal, bias, first, begin, end, head):
        for i in range(end - begin + tiles.query_tile - 1):
            diagonal[i] = T.max(
                bias[head, T.max(max_length - 1 + (end - 1 - first) - i, 0)] * T.float32(math.log2(math.e)),
                T.float32(_LOWEST),
            )

    return load_bias


def _scores(k: _Operand, v: _Operand, width: int, key_tile: int, leftover: int, position_bias: bool) -> Macro:
    """`scores(panel, weights, peak, k, v, diagonal, begin, end, head, last, rows)`: step 2 for `width` queries.

    Fills weights[key, query] with the scores and peak[query] with their maximum.
    """

    def key_of(key: Expr, length: Expr, whole: bool) -> Expr:
        return key if whole else T.min(key, length - 1)

    def initial(diagonal: tvm.tirx.Buffer, index: Expr) -> Expr:
        return diagonal[index] if position_bias else T.float32(0)

    @T.inline
    def prefetch_next(k_in, v_in, row, head, keys, rows):
        for i in range(keys):
            for line in T.unroll(k.cache_lines):
                T.evaluate(k.prefetch(k_in, T.min(row + i, rows - 1), head, line))
                T.evaluate(v.prefetch(v_in, T.min(row + i, rows - 1), head, line))

    @T.inline
    def tile(panel, weights, peak, k_in, diagonal, begin, length, head, key, keys, whole):
        with T.sblock("scores"):
            T.reads()
            T.writes()
            acc = T.sblock_alloc_buffer((keys, width), "float32", scope="local")
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    acc[i, j] = initial(diagonal, length - 1 - key_of(key + i, length, whole) + j)
            for d in range(k.head_dim):
                for i in T.unroll(keys):
                    for j in T.vectorized(width):
                        acc[i, j] = (
                            acc[i, j]
                            + k.at(k_in, begin + key_of(key + i, length, whole), head, d) * panel[d, j]
                        )
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    weights[key + i, j] = acc[i, j]
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    peak[j] = T.max(peak[j], acc[i, j])

    @T.inline
    def scores(panel, weights, peak, k_in, v_in, diagonal, begin, end, head, last, rows):
        whole: T.let = (end - begin) // key_tile
        for j in T.vectorized(width):
            peak[j] = T.float32(3 * _LOWEST)
        for i in range(whole):
            if last == end:
                prefetch_next(k_in, v_in, end + i * key_tile, head, key_tile, rows)
            tile(panel, weights, peak, k_in, diagonal, begin, end - begin, head, i * key_tile, key_tile, True)
        for i in range(((end - begin) % key_tile + leftover - 1) // leftover):
            key: T.let = whole * key_tile + i * leftover
            if last == end:
                prefetch_next(k_in, v_in, end + key, head, leftover, rows)
            tile(panel, weights, peak, k_in, diagonal, begin, end - begin, head, key, leftover, False)

    return scores


def _softmax(width: int) -> Macro:
    """`softmax(weights, peak, inverse, length)`: step 3. weights become 2^(score - peak); inverse is 1 / their sum."""

    @T.inline
    def row(weights, peak, inverse, key):
        for j in T.vectorized(width):
            weights[key, j] = _exp2(weights[key, j] - peak[j])
        for j in T.vectorized(width):
            inverse[j] = inverse[j] + weights[key, j]

    @T.inline
    def softmax(weights, peak, inverse, length):
        for j in T.vectorized(width):
            inverse[j] = T.float32(0)
        for block in range(length // 4):
            for i in T.unroll(4):
                row(weights, peak, inverse, block * 4 + i)
        for i in range(length % 4):
            row(weights, peak, inverse, length // 4 * 4 + i)
        for j in T.vectorized(width):
            inverse[j] = T.float32(1) / inverse[j]

    return softmax


def _weigh(tiles: CpuTiles, v: _Operand, out: _Operand) -> Macro:
    """`weigh(weights, inverse, v, out, first, last, begin, end, head)`: step 4, over all columns of the head."""
    group = 8 if tiles.row_tile >= 8 else 4
    whole = v.head_dim // tiles.col_tile

    @T.inline
    def columns(weights, inverse, v_in, out_buffer, first, last, begin, end, head, column, width):
        for g in range((last - first + group - 1) // group):
            with T.sblock("weigh"):
                T.reads()
                T.writes()
                acc = T.sblock_alloc_buffer((group, width), "float32", scope="local")
                for i in T.unroll(group):
                    for j in T.vectorized(width):
                        acc[i, j] = T.float32(0)
                for key in range(end - begin):
                    for i in T.unroll(group):
                        for j in T.vectorized(width):
                            acc[i, j] = acc[i, j] + weights[key, g * group + i] * v.at(
                                v_in, begin + key, head, column + j
                            )
                for i in T.unroll(group):
                    if first + g * group + i < last:
                        for j in T.vectorized(width):
                            out_buffer[
                                (first + g * group + i) // tiles.row_tile,
                                (first + g * group + i) % tiles.row_tile,
                                head * out.head_dim + column + j,
                            ] = acc[i, j] * inverse[g * group + i]

    @T.inline
    def rest(weights, inverse, v_in, out_buffer, first, last, begin, end, head, width, again):
        if v.head_dim % (width * 2) >= width:
            columns(
                weights, inverse, v_in, out_buffer, first, last, begin, end, head,
                v.head_dim // (width * 2) * (width * 2), width,
            )  # fmt: skip
        if width > 1:
            again(weights, inverse, v_in, out_buffer, first, last, begin, end, head, width // 2, again)

    @T.inline
    def weigh(weights, inverse, v_in, out_buffer, first, last, begin, end, head):
        for block in range(whole):
            columns(
                weights, inverse, v_in, out_buffer, first, last, begin, end, head,
                block * tiles.col_tile, tiles.col_tile,
            )  # fmt: skip
        rest(weights, inverse, v_in, out_buffer, first, last, begin, end, head, tiles.col_tile // 2, rest)

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
    (q_width, q_offset), (k_width, k_offset), (v_width, v_offset) = q, k, v
    q_head, k_head, v_head, out_head = (
        _Operand(tiles, head_dim, offset) for offset in (q_offset, k_offset, v_offset, 0)
    )
    load_queries = _load_queries(tiles, q_head, out_head, scale * math.log2(math.e))
    load_bias = _load_bias(tiles, max_length)
    narrow_scores = _scores(k_head, v_head, lanes, _NARROW_KEYS, _NARROW_KEYS, position_bias)
    wide_scores = _scores(k_head, v_head, queries, row_tile, _LEFTOVER_KEYS, position_bias)
    narrow_softmax, wide_softmax = _softmax(lanes), _softmax(queries)
    weigh = _weigh(tiles, v_head, out_head)
    scratch_keys = max_length + _NARROW_KEYS  # a leftover tile ends less than its height past the last key
    diagonal_size = max_length + queries if position_bias else 1

    @T.inline
    def attend(q_in, k_in, v_in, bias, out, first, last, begin, end, head, rows):
        with T.sblock("attend"):
            T.reads()
            T.writes()
            panel = T.sblock_alloc_buffer((head_dim, queries), "float32")
            weights = T.sblock_alloc_buffer((scratch_keys, queries), "float32")
            diagonal = T.sblock_alloc_buffer((diagonal_size,), "float32")
            peak = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            inverse = T.sblock_alloc_buffer((queries,), "float32", scope="local")
            load_queries(panel, q_in, out, first, last, head, rows)
            if position_bias:
                load_bias(diagonal, bias, first, begin, end, head)
            if last - first <= lanes:
                narrow_scores(panel, weights, peak, k_in, v_in, diagonal, begin, end, head, last, rows)
                narrow_softmax(weights, peak, inverse, end - begin)
            else:
                wide_scores(panel, weights, peak, k_in, v_in, diagonal, begin, end, head, last, rows)
                wide_softmax(weights, peak, inverse, end - begin)
            weigh(weights, inverse, v_in, out, first, last, begin, end, head)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        q_arg: T.handle,
        k_arg: T.handle,
        v_arg: T.handle,
        query_tiles_arg: T.handle,
        bias: T.Buffer((heads, 2 * max_length - 1), "float32"),
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        nq = T.int64()
        q_in = T.match_buffer(q_arg, (t, row_tile, q_width), "float32")
        k_in = T.match_buffer(k_arg, (t, row_tile, k_width), "float32")
        v_in = T.match_buffer(v_arg, (t, row_tile, v_width), "float32")
        query_tiles = T.match_buffer(query_tiles_arg, (nq, 3), "int32")
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
                    attend(q_in, k_in, v_in, bias, out, first, last, begin, end, task // nq, t * row_tile)

    return kernel if position_bias else without_parameters(kernel, ["bias"])
