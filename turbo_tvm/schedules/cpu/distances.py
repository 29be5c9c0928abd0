"""Disentangled attention (DeBERTa): tables over the distance between query and key, and their part of the scores.

    score(i, j) += q_i . A[i - j] + k_j . B[i - j]

Layout: a table is fp32 `(heads, head_dim, W)`, or bf16 pairs along head_dim, int32 `(heads, head_dim / 2, W)`; flat,
for TVM is slow to simplify the sums in its indices. Column i - j + max_length - 1 belongs to a distance. W leaves room
for the lanes of a query tile past the last query, and is an odd number of cache lines, so that the rows of a table do
not fall into one set of a first-level cache.

Strategy
1. A score tile has queries across the lanes, and for one key the distances to them are consecutive. So both terms are
   vectors of a table, loaded unaligned, one FMA each next to that of q_i . k_j: no gather, no buckets and no scratch,
   and a tile reads the same columns as the one before but for as many as it has keys.
2. Tables are packed when a model is compiled, a task per row of them.

The floor is 3 head_dim FMAs per pair of query and key. Rejected by arithmetic: scores against every bucket, in panels
per query tile (A) and per sequence (B), to gather from: 1 + (length + Q) / length + min(2 length, buckets) / length
times head_dim, which is more than 3 up to the length at which buckets run out (512 for DeBERTa v3), and the gathers.

Method: DeBERTa (arXiv 2006.03654); the buckets of v3 are in the tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import PackDistances
from turbo_tvm.schedules.common.space import Macro, Variant
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.tiles import CpuTiles


def add_distances_macro(lanes: int, of_keys: bool, of_queries: bool, in_pairs: bool) -> Macro:
    """`add_distances(task, acc, i, a, d, column)`: element (or pair) d of both terms into acc[i, :].

    a: element d of key i; column: where row 0 of the tables has the distance from the first query to it. of_keys,
    of_queries: which tables there are.
    """

    @T.inline
    def in_fp32(task, acc, i, a, d, column):
        # 1. vectors of a table: their columns are neighbours because their distances are
        row = T.meta_var(column + d * task.distances.width)
        if of_keys:
            for j in T.vectorized(acc.shape[1]):
                acc[i, j] = acc[i, j] + task.panel[d, j] * task.distances.of_keys[row + j]
        if of_queries:
            for j in T.vectorized(acc.shape[1]):
                acc[i, j] = acc[i, j] + a * task.distances.of_queries[row + j]

    @T.inline
    def in_bf16(task, acc, i, a, d, column):
        # 1. the same in pairs
        for v in T.unroll(acc.shape[1] // lanes):
            at = T.meta_var(T.ramp(v * lanes, 1, lanes))
            there = T.meta_var(T.ramp(column + d * task.distances.width + v * lanes, 1, lanes))
            if of_keys:
                acc[i, at] = bf16.dot(acc[i, at], task.panel[d, at], task.distances.of_keys[there])
            if of_queries:
                acc[i, at] = bf16.dot(acc[i, at], T.broadcast(a, lanes), task.distances.of_queries[there])

    return in_bf16 if in_pairs else in_fp32


def pack_distances(operator: PackDistances, _tiles: CpuTiles, _variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(table, packed)`: fp32 `(heads, head_dim, columns)` to flat `(heads, head_dim, width)`, zeros beyond.

    In pairs along head_dim it is bf16 in int32, flat `(heads, head_dim / 2, width)`. The tiles do not matter.
    """
    heads, head_dim, columns, width = operator.heads, operator.head_dim, operator.columns, operator.row_width
    pairs, dtype = operator.in_pairs, operator.out.dtype
    step = 2 if pairs else 1

    def element(table: tvm.tirx.Buffer, head: Expr, d: Expr, column: Expr) -> Expr:
        """Return an element of the packed table."""
        if pairs:
            return bf16.pair(table[head, 2 * d, column], table[head, 2 * d + 1, column])
        return table[head, d, column]

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        table: T.Buffer((heads, head_dim, columns), "float32"),
        packed: T.Buffer((heads * (head_dim // step) * width,), dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        # 2. a task per row
        for row in T.parallel(heads * (head_dim // step)):
            head: T.let = row // (head_dim // step)
            d: T.let = row % (head_dim // step)
            for column in range(columns):
                packed[row * width + column] = element(table, head, d, column)
            for rest in range(width - columns):
                packed[row * width + columns + rest] = T.cast(0, dtype)

    return kernel
