"""A debug mode: every byte that no live tensor covers is overwritten, step by step, while a run goes on.

Before the run all of its memory, and after each step the memory of the tensors that die there, is filled with bytes of
255: NaN in fp32 and bf16, -1 in integers. A kernel that reads what was never written, or what a plan gave away too
early, then gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from turbo_tvm.errors import TurboError
from turbo_tvm.profiling.profiler import is_kernel
from turbo_tvm.runtime.executor import Executor

DEAD = 255


@contextmanager
def dead_memory_is_nan(executor: Executor) -> Iterator[None]:
    """While open, runs of this executor overwrite dead memory; other threads wait. Slow: for tests."""
    checker = _Checker(executor)
    with executor.calling(checker):
        yield


class _Checker:
    """Stands in for the executor's function: the same code, on a VM with a hook."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self._vm = executor.another_vm()
        self._vm.set_instrument(self._after)
        self._function = self._vm[executor.manifest.entry]
        self._step = 0
        self._regions: list[np.ndarray] = []

    def __call__(self, *args: Any) -> Any:
        self._regions = self._executor.buffers.held_regions()
        for block in self._executor.buffers.arena.blocks:
            block[:] = DEAD
        self._step = 0
        out = self._function(*args)
        if self._step != len(self._executor.manifest.steps):
            raise TurboError(f"a run has {self._step} steps, the artifact says {len(self._executor.manifest.steps)}")
        return out

    def _after(self, func: Any, name: str, before: bool, _result: Any, *args: Any) -> int:
        if before or not is_kernel(func, name):
            return 0
        steps = self._executor.manifest.steps
        if self._step >= len(steps) or name != steps[self._step]:
            raise TurboError(
                f"step {self._step} of a run is {name}, the artifact says {steps[self._step : self._step + 1]}"
            )
        for region, record in zip(self._regions, self._executor.buffers.arena.table.records, strict=True):
            if record.last == self._step:
                region[:] = DEAD
        self._step += 1
        return 0
