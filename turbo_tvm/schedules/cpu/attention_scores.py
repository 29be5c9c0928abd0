"""Step 2 of the strategy of `attention.py`: scores of a task, transposed, and their maximum over keys."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_task import LOWEST, Task


@dataclass(frozen=True)
class ScoreTiles:
    """How the scores of tasks of one width are computed."""

    width: int  # queries
    key_tile: int  # keys of a register tile
    leftover: int  # keys of the tiles for what that leaves over
    accumulate: Macro  # of `fp32_accumulate_macro` or `bf16_accumulate_macro`
    position_bias: bool
    window: int | None = None
    add_distances: Macro | None = None  # see `distances.py`


def in_window(task: Task, key: Expr, lane: Expr, window: int, value: Expr) -> Expr:
    """Return a score where the query in that lane sees the key, else one that weighs nothing."""
    distance = T.cast(task.begin + key - task.first, "int32") - lane
    return T.Select(T.max(distance, -distance) <= window, value, T.float32(LOWEST))


def scores_macro(form: ScoreTiles) -> Macro:
    """`scores(task, k, v)`: step 2: scores into weights[key, query], their maximum into peak."""
    width, key_tile, leftover = form.width, form.key_tile, form.leftover
    prefetch_next, tile = _prefetch_next_macro(), _score_tile_macro(form)

    def same(task: Task, key: Expr) -> Expr:
        return key

    def last_repeated(task: Task, key: Expr) -> Expr:
        return T.min(key, task.keys - 1)

    @T.inline
    def scores(task, k, v):
        for j in T.vectorized(width):
            task.peak[j] = T.float32(3 * LOWEST)
        # 2. whole tiles of keys
        for i in range(task.keys // key_tile):
            prefetch_next(task, k, v, i * key_tile, key_tile)
            tile(task, k, i * key_tile, key_tile, same)
        # 2. the keys left over, in smaller tiles, whose surplus rows repeat the last key
        for i in range((task.keys % key_tile + leftover - 1) // leftover):
            key: T.let = task.keys // key_tile * key_tile + i * leftover
            prefetch_next(task, k, v, key, leftover)
            tile(task, k, key, leftover, last_repeated)

    return scores


def _prefetch_next_macro() -> Macro:
    """`prefetch_next(task, k, v, key, keys)`: keys and values of the next sequence, in a sequence's last task."""

    @T.inline
    def prefetch_next(task, k, v, key, keys):
        if task.last == task.end:
            for i in range(keys):
                for line in T.unroll(k.cache_lines):
                    k.prefetch(task.end + key + i, line)
                    v.prefetch(task.end + key + i, line)

    return prefetch_next


def _score_tile_macro(form: ScoreTiles) -> Macro:
    """`tile(task, k, first, keys, key_of)`: the scores of so many keys; key_of(task, i) is the key in row i."""
    width, accumulate, add_distances = form.width, form.accumulate, form.add_distances

    def initial(task: Task, key: Expr, lane: Expr) -> Expr:
        bias = T.float32(0)
        if form.position_bias:
            assert task.diagonal is not None
            bias = task.diagonal[task.keys - 1 - key + lane]
        return bias if form.window is None else in_window(task, key, lane, form.window, bias)

    @T.inline
    def tile(task, k, first, keys, key_of):
        with T.sblock("scores"):
            T.reads()
            T.writes()
            acc = T.sblock_alloc_buffer((keys, width), "float32", scope="local")
            # in memory, because TVM takes long over the sums in their indices
            element = T.sblock_alloc_buffer((keys,), k.buffer.dtype, scope="local")
            columns = T.sblock_alloc_buffer((keys,), "int64", scope="local")
            if add_distances is not None:
                for i in T.unroll(keys):
                    columns[i] = task.distances.at(task, key_of(task, first + i))
            # bias and window, as what the scores start with
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    acc[i, j] = initial(task, key_of(task, first + i), j)
            # the product of keys and queries
            for d in range(k.head_dim):
                for i in T.unroll(keys):
                    if add_distances is None:
                        accumulate(acc, i, k.at(task.begin + key_of(task, first + i), d), task.panel, d, 0)
                    else:
                        element[i] = k.at(task.begin + key_of(task, first + i), d)
                        accumulate(acc, i, element[i], task.panel, d, 0)
                        add_distances(task, acc, i, element[i], d, columns[i])
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    task.weights[first + i, j] = acc[i, j]
            # the maximum falls out
            for i in T.unroll(keys):
                for j in T.vectorized(width):
                    task.peak[j] = T.max(task.peak[j], acc[i, j])

    return tile


def fp32_accumulate_macro() -> Macro:
    """`accumulate(acc, i, a, buffer, row, column)`: acc[i, j] += a * buffer[row, column + j] for all j."""

    @T.inline
    def accumulate(acc, i, a, buffer, row, column):
        for j in T.vectorized(acc.shape[1]):
            acc[i, j] = acc[i, j] + a * buffer[row, column + j]

    return accumulate


def bf16_accumulate_macro(lanes: int) -> Macro:
    """`accumulate`, the same where `a` and the buffer hold pairs: acc[i, j] += a0 * buffer0 + a1 * buffer1."""

    @T.inline
    def accumulate(acc, i, a, buffer, row, column):
        for v in T.unroll(acc.shape[1] // lanes):
            acc[i, T.ramp(v * lanes, 1, lanes)] = bf16.dot(
                acc[i, T.ramp(v * lanes, 1, lanes)],
                T.broadcast(a, lanes),
                buffer[row, T.ramp(column + v * lanes, 1, lanes)],
            )

    return accumulate
