"""The arithmetic of an attention task: steps 2 to 4 of the strategy in `schedules/attention.py`."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_task import LOWEST, Macro, Rows, Task

# 2^x on [-1/2, 1/2]: relative error 2e-7, and 8e-5 where the result is stored in bf16
_EXP2_BF16 = (5.517162e-2, 2.4261112e-1, 6.9326099e-1, 9.9992807e-1)
_EXP2 = (1.5353362e-4, 1.3398874e-3, 9.6184374e-3, 5.5503325e-2, 2.4022648e-1, 6.9314720e-1, 1.0)


def _exp2(x: Expr, coefficients: Sequence[float]) -> Expr:
    """2^x for x <= 0; exactly 0 from -126.5 down. Adding `shift` rounds, as in `vector_math.exp`.

    The integer goes through `reinterpret` twice because TVM would simplify x - ((x + shift) - shift) to 0.
    """
    shift = T.float32(1.5 * 2**23 + 127)
    x = T.max(x, T.float32(-127))
    shifted = T.reinterpret(str(x.ty).replace("float", "int"), x + shift)
    r = x - (T.reinterpret(x.ty, shifted) - shift)
    total = T.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * r + T.float32(coefficient)
    return total * T.reinterpret(x.ty, T.shift_left(shifted, T.int32(23)))


def in_window(task: Task, key: Expr, lane: Expr, window: int, value: Expr) -> Expr:
    """A score where the query in that lane sees the key, else one that weighs nothing."""
    distance = T.cast(task.begin + key - task.first, "int32") - lane
    return T.Select(T.max(distance, -distance) <= window, value, T.float32(LOWEST))


def scores_macro(
    width: int,
    key_tile: int,
    leftover: int,
    position_bias: bool,
    accumulate: Macro,
    window: int | None = None,
    add_distances: Macro | None = None,
) -> Macro:
    """`scores(task, k, v)`: step 2 for `width` queries: scores into weights[key, query], their maximum into peak.

    accumulate: `fp32_accumulate_macro` or `bf16_accumulate_macro`. add_distances: see `distances.py`.
    """

    def initial(task: Task, key: Expr, lane: Expr) -> Expr:
        bias = task.diagonal[task.keys - 1 - key + lane] if position_bias else T.float32(0)
        return bias if window is None else in_window(task, key, lane, window, bias)

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
            # In memory, because TVM takes long over the sums in their indices.
            element = T.sblock_alloc_buffer((keys,), k.buffer.dtype, scope="local")
            columns = T.sblock_alloc_buffer((keys,), "int64", scope="local")
            if add_distances is not None:
                for i in T.unroll(keys):
                    columns[i] = task.distances.at(task, key_of(task, first + i))
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    acc[i, j] = initial(task, key_of(task, first + i), j)
            for d in range(k.head_dim):
                for i in T.unroll(keys):
                    if add_distances is None:
                        accumulate(acc, i, k.at(task.begin + key_of(task, first + i), d), task.panel, d, 0, width)
                    else:
                        element[i] = k.at(task.begin + key_of(task, first + i), d)
                        accumulate(acc, i, element[i], task.panel, d, 0, width)
                        add_distances(task, acc, i, element[i], d, columns[i], width)
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    task.weights[first + i, j] = acc[i, j]
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    task.peak[j] = T.max(task.peak[j], acc[i, j])

    def same(task: Task, key: Expr) -> Expr:
        return key

    def last_repeated(task: Task, key: Expr) -> Expr:
        return T.min(key, task.keys - 1)

    @T.inline
    def scores(task, k, v):
        for j in T.vectorized(width):
            task.peak[j] = T.float32(3 * LOWEST)
        for i in range(task.keys // key_tile):
            prefetch_next(task, k, v, i * key_tile, key_tile)
            tile(task, k, i * key_tile, key_tile, same)
        for i in range((task.keys % key_tile + leftover - 1) // leftover):
            key: T.let = task.keys // key_tile * key_tile + i * leftover
            prefetch_next(task, k, v, key, leftover)
            tile(task, k, key, leftover, last_repeated)

    return scores


def fp32_accumulate_macro() -> Macro:
    """`accumulate(acc, i, a, buffer, row, column, width)`: acc[i, :width] += a * buffer[row, column:][:width]."""

    @T.inline
    def accumulate(acc, i, a, buffer, row, column, width):
        for j in T.vectorized(width):
            acc[i, j] = acc[i, j] + a * buffer[row, column + j]

    return accumulate


def bf16_accumulate_macro(lanes: int) -> Macro:
    """The same where `a` and the buffer hold pairs: acc[i, j] += a0 * buffer0 + a1 * buffer1."""

    @T.inline
    def accumulate(acc, i, a, buffer, row, column, width):
        for v in T.unroll(width // lanes):
            acc[i, T.ramp(v * lanes, 1, lanes)] = bf16.dot(
                acc[i, T.ramp(v * lanes, 1, lanes)],
                T.broadcast(a, lanes),
                buffer[row, T.ramp(column + v * lanes, 1, lanes)],
            )

    return accumulate


def softmax_macro(width: int, scale: float, in_pairs: bool) -> Macro:
    """`softmax(task)`: step 3: 2^(scale (score - peak)) into `weights`, or in pairs of keys into `pairs`; 1 / sum.

    The last of an odd number of keys is paired with a weight of 0.
    """
    group = 4

    def weight(task: Task, key: Expr, lane: Expr) -> Expr:
        return _exp2((task.weights[key, lane] - task.peak[lane]) * T.float32(scale), _EXP2_BF16 if in_pairs else _EXP2)

    @T.inline
    def row(task, key):
        for j in T.vectorized(width):
            task.weights[key, j] = weight(task, key, j)
        for j in T.vectorized(width):
            task.inverse[j] += task.weights[key, j]

    @T.inline
    def put_pair(task, key, last):
        # the weights are computed once: LLVM merges equal expressions
        for j in T.vectorized(width):
            task.inverse[j] += weight(task, key, j) + (T.float32(0) if last else weight(task, key + 1, j))
            task.pairs[key // 2, j] = bf16.pair_half_up(
                weight(task, key, j), T.float32(0) if last else weight(task, key + 1, j)
            )

    @T.inline
    def softmax(task):
        for j in T.vectorized(width):
            task.inverse[j] = T.float32(0)
        if in_pairs:
            for block in range(task.keys // 2):
                put_pair(task, block * 2, False)
            if task.keys % 2 == 1:
                put_pair(task, task.keys - 1, True)
        else:
            for block in range(task.keys // group):
                for i in T.unroll(group):
                    row(task, block * group + i)
            for i in range(task.keys % group):
                row(task, task.keys // group * group + i)
        for j in T.vectorized(width):
            task.inverse[j] = T.float32(1) / task.inverse[j]

    return softmax


def pair_values_macro(lanes: int, head_dim: int) -> Macro:
    """`pair_values(task, v)`: the values of keys 2i and 2i + 1 side by side in values[i].

    Columns are filled up to whole vectors with zeros, and so is the partner of a last odd key.
    """
    whole = head_dim // lanes * lanes

    def bits(v: Rows, row: Expr, column: Expr) -> Expr:
        value = v.at(row, column)
        return T.cast(value, str(value.ty).replace("uint16", "uint32"))

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

    @T.inline
    def put(task, out, acc, i, row, query, column, width):
        if padded == head_dim or column + width <= head_dim:
            for j in T.vectorized(width):
                out.buffer[out.index(row, column + j)] = bf16.stored(out.buffer, acc[i, j] * task.inverse[query])
        else:
            for j in range(head_dim - column):
                out.buffer[out.index(row, column + j)] = bf16.stored(out.buffer, acc[i, j] * task.inverse[query])

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
                            accumulate(acc, i, task.pairs[pair, block * group + i], task.values, pair, column, width)
                else:
                    for key in range(task.keys):
                        for i in T.unroll(group):
                            for j in T.vectorized(width):
                                acc[i, j] += task.weights[key, block * group + i] * v.at(task.begin + key, column + j)
                for i in T.unroll(group):
                    row = T.meta_var(task.first + block * group + i)
                    if row < task.last:
                        put(task, out, acc, i, row, block * group + i, column, width)

    @T.inline
    def rest(task, v, out, width, again):
        if padded & width > 0:
            columns(task, v, out, padded // (2 * width) * (2 * width), width)
        if width > narrowest:
            again(task, v, out, width // 2, again)

    @T.inline
    def weigh(task, v, out):
        for block in range(padded // col_tile):
            columns(task, v, out, block * col_tile, col_tile)
        if narrowest < col_tile:
            rest(task, v, out, col_tile // 2, rest)

    return weigh
