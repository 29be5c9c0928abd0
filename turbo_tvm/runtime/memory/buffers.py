"""TVM's tensors in what the arena holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import tvm

from turbo_tvm.runtime.memory.arena import Arena
from turbo_tvm.runtime.device.devices import KEPT_SHAPES, Block, Device, Host
from turbo_tvm.artifact.manifest import BufferSpec
from turbo_tvm.runtime.memory.planner import COMPACT, Plan
from turbo_tvm.runtime.memory.table import MemoryTable, Symbols


class Buffers:
    """Gives every buffer of a compiled function its tensor for a batch. Steady state allocates nothing.

    strategy, largest: as the arena's. forget: called before memory goes, to drop results that lie in it. device: where
    the memory is.
    """

    def __init__(
        self,
        specs: Sequence[BufferSpec],
        strategy: str = "compact",
        largest: Symbols | None = None,
        forget: Callable[[], None] = lambda: None,
        device: Device | None = None,
    ):
        self._views: OrderedDict[tuple[int, ...], list[tvm.runtime.Tensor]] = OrderedDict()
        self._held: tuple[Plan, Symbols] | None = None
        self._device = device or Host()
        table = MemoryTable(specs, strategy in COMPACT)
        self.arena: Arena[Block] = Arena(
            table, self._device.allocate, self._drop_views, strategy=strategy, largest=largest
        )
        self._forget = forget

    def tensors(self, symbols: Symbols) -> list[tvm.runtime.Tensor]:
        """The buffers in call order, 64-byte aligned. MemoryBudgetError if they do not fit the budget."""
        plan = self.arena.hold(symbols)
        self._held = plan, symbols
        key = tuple(symbols.values())
        if key not in self._views:
            table, blocks = self.arena.table, self.arena.blocks
            self._views[key] = [
                self._device.view(blocks[plan.places[i].chunk], plan.places[i].offset, dtype, shape)
                for i, dtype, shape in zip(table.places, table.dtypes, table.shapes(symbols), strict=True)
            ]
            while len(self._views) > KEPT_SHAPES:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]

    def _drop_views(self) -> None:
        self._views.clear()
        self._forget()

    def held_regions(self) -> list[np.ndarray]:
        """The bytes of every place of the latest batch, by the table's numbers; of this machine's memory only."""
        if self._held is None:
            return []
        plan, symbols = self._held
        blocks, sizes = self.arena.blocks, self.arena.table.sizes(symbols)
        return [blocks[p.chunk][p.offset : p.offset + size] for p, size in zip(plan.places, sizes, strict=True)]
