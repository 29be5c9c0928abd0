"""The arithmetic of an attention task: steps 2 to 4 of the strategy in `schedules/attention.py`."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.attention_task import LOWEST, Macro, Task

_EXP2 = (1.5353362e-4, 1.3398874e-3, 9.6184374e-3, 5.5503325e-2, 2.4022648e-1, 6.9314720e-1, 1.0)


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


def scores_macro(width: int, key_tile: int, leftover: int, position_bias: bool) -> Macro:
    """`scores(task, k, v)`: step 2 for `width` queries: scores into weights[key, query], their maximum into peak."""

    def initial(task: Task, key: Expr, lane: Expr) -> Expr:
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


def softmax_macro(width: int) -> Macro:
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


def weigh_macro(group: int, col_tile: int, head_dim: int) -> Macro:
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
