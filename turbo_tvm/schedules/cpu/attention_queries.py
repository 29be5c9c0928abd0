"""Step 1 of the strategy of `attention.py`: queries into a panel, and biases into a diagonal."""

from __future__ import annotations

from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu.attention_task import LOWEST
from turbo_tvm.schedules.cpu.transpose import transpose_macro


def load_queries_macro(lanes: int, queries: int, columns: int, dtype: str) -> Macro:
    """`load_queries(task, q, out)`: step 1 for rows of q with so many columns. Lanes past the last query repeat it."""
    transpose, swapped = transpose_macro(lanes), lanes.bit_length() % 2 == 0
    whole = columns // lanes * lanes

    @T.inline
    def prefetch_next(task, q, out):
        for i in range(task.queries):
            for line in T.unroll(q.cache_lines):
                q.prefetch(task.last + i, line)
                out.prefetch(task.last + i, line, True)

    @T.inline
    def load_queries(task, q, out):
        # the rows of the next sequence follow those of this one
        prefetch_next(task, q, out)
        # 1. transpose blocks of `lanes` queries by `lanes` columns
        for block, group in T.grid(columns // lanes, (task.queries + lanes - 1) // lanes):
            with T.sblock("transpose"):
                T.reads()
                T.writes()
                a = T.sblock_alloc_buffer((lanes, lanes), dtype, scope="local")
                b = T.sblock_alloc_buffer((lanes, lanes), dtype, scope="local")
                for i in T.unroll(lanes):
                    row = T.meta_var(T.min(task.first + group * lanes + i, task.last - 1))
                    for j in T.vectorized(lanes):
                        a[i, j] = q.at(row, block * lanes + j)
                transpose(a, b)
                done = T.meta_var(b if swapped else a)
                for i in T.unroll(lanes):
                    for j in T.vectorized(lanes):
                        task.panel[block * lanes + i, group * lanes + j] = done[i, j]
        # the columns left over, one by one
        for d, j in T.grid(columns - whole, queries):
            task.panel[whole + d, j] = q.at(T.min(task.first + j, task.last - 1), whole + d)

    return load_queries


def load_bias_macro(queries: int, max_length: int, scale: float) -> Macro:
    """`load_bias(task, bias, head)`: the bias of query lane i, key j, over scale, goes to diagonal[keys - 1 - j + i].

    Reversed on the way in, so that the lanes of a score tile read it forwards. Lanes past the sequence may lie before
    the table: they read its first element.
    """

    @T.inline
    def load_bias(task, bias, head):
        for i in range(task.keys + queries - 1):
            column = T.meta_var(T.max(max_length - 1 + (task.end - 1 - task.first) - i, 0))
            task.diagonal[i] = T.max(bias[head, column] * T.float32(1 / scale), T.float32(LOWEST))

    return load_bias
