"""Step 4 of the strategy of `attention.py`: values, weighted and summed over keys."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_task import Rows


def pair_values_macro(lanes: int, head_dim: int) -> Macro:
    """`pair_values(task, v)`: the values of keys 2i and 2i + 1 side by side in values[i].

    Columns are filled up to whole vectors with zeros, and so is the partner of a last odd key.
    """
    whole = head_dim // lanes * lanes

    def bits(v: Rows, row: Expr, column: Expr) -> Expr:
        """Return the bits of a value, in 32."""
        return bf16.widened(v.at(row, column))

    @T.inline
    def put(task, v, key, column, last):
        task.values[key // 2, column] = T.reinterpret(
            "int32",
            bits(v, task.begin + key, column)
            if last
            else T.bitwise_or(
                bits(v, task.begin + key, column), T.shift_left(bits(v, task.begin + key + 1, column), T.uint32(16))
            ),
        )

    @T.inline
    def put_row(task, v, key, last):
        for block in range(head_dim // lanes):
            for j in T.vectorized(lanes):
                put(task, v, key, block * lanes + j, last)
        for j in range(head_dim - whole):
            put(task, v, key, whole + j, last)
        for j in range(-head_dim % lanes):
            task.values[key // 2, head_dim + j] = 0

    @T.inline
    def pair_values(task, v):
        for block in range(task.keys // 2):
            put_row(task, v, block * 2, False)
        if task.keys % 2 == 1:
            put_row(task, v, task.keys - 1, True)

    return pair_values


def weigh_macro(group: int, lanes: int, col_tile: int, head_dim: int, in_pairs: bool, accumulate: Macro) -> Macro:
    """`weigh(task, v, out)`: step 4, in tiles of `group` queries by `col_tile` columns, a half of it, a quarter ..."""
    narrowest = lanes if in_pairs else 1
    padded = -(-head_dim // narrowest) * narrowest
    columns = _weigh_columns_macro(group, head_dim, padded, in_pairs, accumulate)

    @T.inline
    def rest(task, v, out, width, again):
        if padded & width > 0:
            columns(task, v, out, padded // (2 * width) * (2 * width), width)
        if width > narrowest:
            again(task, v, out, width // 2, again)

    @T.inline
    def weigh(task, v, out):
        # 4. whole tiles of columns, then what head_dim leaves over in halves of them
        for block in range(padded // col_tile):
            columns(task, v, out, block * col_tile, col_tile)
        if narrowest < col_tile:
            rest(task, v, out, col_tile // 2, rest)

    return weigh


def _weigh_columns_macro(group: int, head_dim: int, padded: int, in_pairs: bool, accumulate: Macro) -> Macro:
    """`columns(task, v, out, column, width)`: step 4 for `width` columns of all queries, `group` of them at once.

    padded: head_dim, rounded up to what a tile may read; the columns beyond head_dim are not stored.
    """

    @T.inline
    def put(task, out, acc, i, query, column):
        row = T.meta_var(task.first + query + i)
        if padded == head_dim or column + int(acc.shape[1]) <= head_dim:
            for j in T.vectorized(acc.shape[1]):
                out.buffer[out.index(row, column + j)] = bf16.stored(out.buffer, acc[i, j] * task.inverse[query + i])
        else:
            for j in range(head_dim - column):
                out.buffer[out.index(row, column + j)] = bf16.stored(out.buffer, acc[i, j] * task.inverse[query + i])

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
                if in_pairs:
                    for pair in range((task.keys + 1) // 2):
                        for i in T.unroll(group):
                            accumulate(acc, i, task.pairs[pair, block * group + i], task.values, pair, column)
                else:
                    for key in range(task.keys):
                        for i in T.unroll(group):
                            for j in T.vectorized(width):
                                acc[i, j] += task.weights[key, block * group + i] * v.at(task.begin + key, column + j)
                for i in T.unroll(group):
                    # 4. divide by the sum; queries past the end are skipped
                    if task.first + block * group + i < task.last:
                        put(task, out, acc, i, block * group, column)

    return columns
