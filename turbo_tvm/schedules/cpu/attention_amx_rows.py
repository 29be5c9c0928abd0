"""Rows for the tiles of `attention_amx.py`, and back: step 1 of its strategy, and the end of step 4."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import amx, bf16
from turbo_tvm.schedules.cpu.attention_amx_form import KEYS, LANES, STEP
from turbo_tvm.schedules.cpu.transpose import transpose_macro


def copy_keys_macro() -> Macro:
    """`copy_keys(source, keys)`: step 1 for the keys: side by side, up to whole blocks."""

    @T.inline
    def copy_keys(source, keys):
        for key in range(source.blocks * KEYS):
            for block in T.unroll(source.rows.head_dim // LANES):
                for j in T.vectorized(LANES):
                    keys[key, block * LANES + j] = source.at(source.begin + key, block * LANES + j)

    return copy_keys


def turn_values_macro() -> Macro:
    """`turn_values(source, values)`: step 1 for the values: values[d, i] is the pair of keys 2i and 2i + 1."""
    turn = _turn_block_macro()

    @T.inline
    def turn_values(source, values):
        for block, part in T.grid(source.blocks, source.rows.head_dim // LANES):
            turn(False, source, values, block * KEYS, part * LANES)
            turn(True, source, values, block * KEYS, part * LANES)

    return turn_values


def _turn_block_macro() -> Macro:
    """`turn(odd, source, values, key, column)`: 32 keys from `key` on, the odd columns of 16 pairs or the even ones."""
    transpose = transpose_macro(LANES)

    def paired(odd: bool, first: Expr, second: Expr) -> Expr:
        """Return the odd halves of two pairs, or the even ones, side by side."""
        if odd:
            half = T.reinterpret("int32", T.shift_right(T.reinterpret("uint32", first), T.uint32(16)))
            return T.bitwise_or(half, T.bitwise_and(second, T.int32(-65536)))
        return T.bitwise_or(T.bitwise_and(first, T.int32(0xFFFF)), T.shift_left(second, T.int32(16)))

    @T.inline
    def turn(odd, source, values, key, column):
        with T.sblock("transpose"):
            T.reads()
            T.writes()
            a = T.sblock_alloc_buffer((LANES, LANES), bf16.PAIR, scope="local")
            b = T.sblock_alloc_buffer((LANES, LANES), bf16.PAIR, scope="local")
            for i in T.unroll(LANES):
                row = T.meta_var(source.begin + key + 2 * i)
                for j in T.vectorized(LANES):
                    a[i, j] = paired(odd, source.at(row, column + j), source.at(row + 1, column + j))
            transpose(a, b)
            for i in T.unroll(LANES):
                for j in T.vectorized(LANES):
                    values[2 * (column + i) + int(odd), key // 2 + j] = a[i, j]

    return turn


def store_rows_macro(head_dim: int) -> Macro:
    """`store_rows(task, turned, out)`: the end of step 4: divided, paired along d, transposed and stored."""
    transpose = transpose_macro(LANES)

    @T.inline
    def store_rows(task, turned, out):
        for block, group in T.grid(head_dim // STEP, (task.queries + LANES - 1) // LANES):
            with T.sblock("transpose"):
                T.reads()
                T.writes()
                a = T.sblock_alloc_buffer((LANES, LANES), bf16.PAIR, scope="local")
                b = T.sblock_alloc_buffer((LANES, LANES), bf16.PAIR, scope="local")
                for i in T.unroll(LANES):
                    for j in T.vectorized(LANES):
                        a[i, j] = bf16.pair_half_up(
                            turned[block * STEP + 2 * i, group * LANES + j] * task.inverse[group * LANES + j],
                            turned[block * STEP + 2 * i + 1, group * LANES + j] * task.inverse[group * LANES + j],
                        )
                transpose(a, b)
                for i in T.unroll(LANES):
                    if group * LANES + i < task.queries:
                        for j in T.vectorized(LANES):
                            out.buffer[out.index(task.first + group * LANES + i, block * amx.PAIRS + j)] = a[i, j]

    return store_rows
