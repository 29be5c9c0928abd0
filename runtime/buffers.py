"""TVM's tensors in the executor's memory: of inputs, and of what the arena holds."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import tvm

from turbo_tvm.runtime.arena import Arena
from turbo_tvm.runtime.manifest import BufferSpec
from turbo_tvm.runtime.memory_planner import ALIGNMENT, COMPACT, Plan
from turbo_tvm.runtime.memory_table import MemoryTable, Symbols

GROWTH = 1.25  # room for the next, slightly longer batch
KEPT_SHAPES = 64  # tensors are kept for so many recent batch shapes


class Buffers:
    """Gives every buffer of a compiled function its tensor for a batch. Steady state allocates nothing.

    strategy, largest: as the arena's. forget: called before memory goes, to drop results that lie in it.
    """

    def __init__(
        self,
        specs: Sequence[BufferSpec],
        strategy: str = "compact",
        largest: Symbols | None = None,
        forget: Callable[[], None] = lambda: None,
    ):
        self._views: OrderedDict[tuple[int, ...], list[tvm.runtime.Tensor]] = OrderedDict()
        self._held: tuple[Plan, Symbols] | None = None
        table = MemoryTable(specs, strategy in COMPACT)
        self.arena: Arena[np.ndarray] = Arena(
            table, aligned_empty, self._drop_views, strategy=strategy, largest=largest
        )
        self._forget = forget

    def tensors(self, symbols: Symbols) -> list[tvm.runtime.Tensor]:
        """The buffers in call order, 64-byte aligned. MemoryBudgetError if they do not fit the budget."""
        plan = self.arena.hold(symbols)
        self._held = plan, symbols
        key = tuple(symbols.values())
        if key not in self._views:
            regions, table = self.held_regions(), self.arena.table
            self._views[key] = [
                tvm.runtime.from_dlpack(regions[place].view(dtype).reshape(shape))
                for place, dtype, shape in zip(table.places, table.dtypes, table.shapes(symbols), strict=True)
            ]
            while len(self._views) > KEPT_SHAPES:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]

    def _drop_views(self) -> None:
        self._views.clear()
        self._forget()

    def held_regions(self) -> list[np.ndarray]:
        """The bytes of every place of the latest batch, by the table's numbers."""
        if self._held is None:
            return []
        plan, symbols = self._held
        blocks, sizes = self.arena.blocks, self.arena.table.sizes(symbols)
        return [blocks[p.chunk][p.offset : p.offset + size] for p, size in zip(plan.places, sizes, strict=True)]


class Input:
    """One input of a compiled function: memory that every call fills anew, with the tensors of recent shapes.

    A tensor of TVM's own costs 12 us, and 100 if the caches are cold; this costs 0.5.
    """

    def __init__(self, dtype: str):
        self._memory = aligned_empty(0).view(dtype)
        self._views: dict[tuple[int, ...], tuple[np.ndarray, tvm.runtime.Tensor]] = {}

    def tensor(self, values: np.ndarray) -> tvm.runtime.Tensor:
        """The values, until the next call."""
        view = self._views.get(values.shape) or self._view(values.shape)
        view[0][...] = values
        return view[1]

    def _view(self, shape: tuple[int, ...]) -> tuple[np.ndarray, tvm.runtime.Tensor]:
        size, dtype = math.prod(shape), self._memory.dtype
        if size > self._memory.size:
            self._views.clear()
            self._memory = aligned_empty(int(size * GROWTH) * dtype.itemsize).view(dtype)
        elif len(self._views) == KEPT_SHAPES:
            del self._views[next(iter(self._views))]
        array = self._memory[:size].reshape(shape)
        self._views[shape] = array, tvm.runtime.from_dlpack(array)
        return self._views[shape]


def aligned_empty(size: int) -> np.ndarray:
    """Uninitialised memory of `size` bytes as a uint8 array that starts on a 64-byte boundary."""
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size]
