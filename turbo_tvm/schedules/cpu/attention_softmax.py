"""Step 3 of the strategy of `attention.py`: softmax over keys, for all queries of a task at once."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.attention_task import Task

# 2^x on [-1/2, 1/2]: relative error 2e-7, and 8e-5 where the result is stored in bf16
_EXP2_BF16 = (5.517162e-2, 2.4261112e-1, 6.9326099e-1, 9.9992807e-1)
_EXP2 = (1.5353362e-4, 1.3398874e-3, 9.6184374e-3, 5.5503325e-2, 2.4022648e-1, 6.9314720e-1, 1.0)


def _exp2(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Return 2^x for x <= 0; exactly 0 from -126.5 down. Adding `shift` rounds, as in `vector_math.exp`.

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
        # 3. weights over keys: no step crosses lanes
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
        # the division waits for step 4
        for j in T.vectorized(width):
            task.inverse[j] = T.float32(1) / task.inverse[j]

    return softmax
