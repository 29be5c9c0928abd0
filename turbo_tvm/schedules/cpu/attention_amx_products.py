"""The products of `attention_amx.py`, by tile instructions: scores (step 3) and weighted values (step 4).

A block of 32 x 32 takes four accumulators, 0 and 2 its left half, 1 and 3 its right one, which 16 queries do without.
"""

from __future__ import annotations

from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import amx
from turbo_tvm.schedules.cpu.attention_amx_form import KEYS, QUERIES, STEP, AmxForm


def scores_macro(form: AmxForm, both: bool) -> Macro:
    """`scores(task, keys, head)`: S[key, query] = K Q^T into `weights`, in blocks of 32 keys."""
    head_dim, pairs_of_head, fetches = form.geometry.head_dim, form.pairs_of_head, form.fetches
    clear, save = _clear_macro(both), _save_macro(both)
    multiply, fetch_next = _multiply_macro(both, pairs_of_head), _fetch_next_macro()

    @T.inline
    def scores(task, keys, head):
        for block in range((task.keys + KEYS - 1) // KEYS):
            if fetches:
                fetch_next(task, head, block)
            clear()
            for i in T.unroll(head_dim // STEP):
                left_at = T.meta_var(block * (KEYS * pairs_of_head) + i * amx.PAIRS)
                multiply(keys, left_at, task.panel, i * amx.PAIRS * QUERIES)
            save(task.weights, block * KEYS)

    return scores


def weigh_macro(form: AmxForm, both: bool) -> Macro:
    """`weigh(task, turned)`: out^T[d, query] = V^T P^T, in blocks of 32 columns over all keys."""
    head_dim, value_width = form.geometry.head_dim, form.value_width
    clear, multiply, save = _clear_macro(both), _multiply_macro(both, value_width), _save_macro(both)

    @T.inline
    def weigh(task, turned):
        for block in T.unroll(head_dim // STEP):
            clear()
            for i in range((task.keys + STEP - 1) // STEP):
                left_at = T.meta_var(block * (STEP * value_width) + i * amx.PAIRS)
                multiply(task.values, left_at, task.pairs, i * amx.PAIRS * QUERIES)
            save(turned, block * STEP)

    return weigh


def _fetch_next_macro() -> Macro:
    """`fetch_next(task, head, block)`: a block of keys and values of the next sequence, in a sequence's last task."""

    @T.inline
    def fetch_next(task, head, block):
        if task.last == task.end:
            for i in range(KEYS):
                for line in T.unroll(head.k.cache_lines):
                    head.k.prefetch(task.end + block * KEYS + i, line)
                    head.v.prefetch(task.end + block * KEYS + i, line)

    return fetch_next


def _clear_macro(both: bool) -> Macro:
    """`clear()`: the accumulators."""

    @T.inline
    def clear():
        amx.zero(0)
        amx.zero(2)
        if both:
            amx.zero(1)
            amx.zero(3)

    return clear


def _multiply_macro(both: bool, stride: int) -> Macro:
    """`multiply(left, left_at, right, right_at)`: 32 rows of `left`, so far apart, times rows of 32 of `right`."""

    @T.inline
    def multiply(left, left_at, right, right_at):
        amx.load(6, right, right_at, QUERIES)
        amx.load(4, left, left_at, stride)
        amx.dot(0, 4, 6)
        amx.load(5, left, left_at + amx.ROWS * stride, stride)
        amx.dot(2, 5, 6)
        if both:
            amx.load(7, right, right_at + amx.PAIRS, QUERIES)
            amx.dot(1, 4, 7)
            amx.dot(3, 5, 7)

    return multiply


def _save_macro(both: bool) -> Macro:
    """`save(out, row)`: the accumulators, to 32 rows of `out`."""

    @T.inline
    def save(out, row):
        amx.store(0, out, row * QUERIES, QUERIES)
        amx.store(2, out, (row + amx.ROWS) * QUERIES, QUERIES)
        if both:
            amx.store(1, out, row * QUERIES + amx.PAIRS, QUERIES)
            amx.store(3, out, (row + amx.ROWS) * QUERIES + amx.PAIRS, QUERIES)

    return save
