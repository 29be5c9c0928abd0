"""Step 3 of the strategy of `attention_amx.py` after its products: the maximum over keys, then softmax into pairs."""

from __future__ import annotations

import math

from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import amx
from turbo_tvm.schedules.cpu.attention_amx_form import STEP
from turbo_tvm.schedules.cpu.attention_scores import in_window
from turbo_tvm.schedules.cpu.attention_softmax import softmax_macro
from turbo_tvm.schedules.cpu.attention_task import LOWEST, Heads


def weights_macro(width: int, geometry: Heads) -> Macro:
    """`weights(task)`: what `width` queries' keys weigh, from their scores."""
    find_peak, clear_rest = _find_peak_macro(width, geometry.window), _clear_rest_macro(width)
    softmax = softmax_macro(width, geometry.scale * math.log2(math.e), True)

    @T.inline
    def weights(task):
        find_peak(task)
        softmax(task)
        clear_rest(task)

    return weights


def _find_peak_macro(width: int, window: int | None) -> Macro:
    """`find_peak(task)`: the greatest score of each query; scores outside of its window are masked."""

    @T.inline
    def find_peak(task):
        for j in T.vectorized(width):
            task.peak[j] = T.float32(3 * LOWEST)
        for key in range(task.keys):
            if window is not None:
                for j in T.vectorized(width):
                    task.weights[key, j] = in_window(task, key, j, window, task.weights[key, j])
            for j in T.vectorized(width):
                task.peak[j] = T.max(task.peak[j], task.weights[key, j])

    return find_peak


def _clear_rest_macro(width: int) -> Macro:
    """`clear_rest(task)`: weights of 0 for the keys that fill up the last block."""

    @T.inline
    def clear_rest(task):
        used = T.meta_var((task.keys + 1) // 2)
        for i in range((task.keys + STEP - 1) // STEP * amx.PAIRS - used):
            for j in T.vectorized(width):
                task.pairs[used + i, j] = 0

    return clear_rest
