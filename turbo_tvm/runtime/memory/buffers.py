"""The tensors of a compiled function's buffers: views of the memory that the arena holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import tvm

from turbo_tvm.artifact.manifest import BufferSpec
from turbo_tvm.runtime.device.devices import KEPT_SHAPES, Block, Device, Host
from turbo_tvm.runtime.memory.arena import Arena
from turbo_tvm.runtime.memory.planner import COMPACT, Plan
from turbo_tvm.runtime.memory.table import MemoryTable, Symbols


class Buffers:
    """Gives every buffer of a compiled function its tensor for a batch. Steady state allocates nothing.

    strategy, largest: as the arena's.
    forget: called before memory is freed, to drop results that lie in it.
    device: where the memory is; this machine's by default.
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
        """Return the buffers' tensors in call order, 64-byte aligned. Raises MemoryBudgetError beyond the budget."""
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
        """Return the memory of every place of the latest batch, uint8 (bytes,), by the table's numbers.

        Works for this machine's memory only, not a GPU's.
        """
        if self._held is None:
            return []
        plan, symbols = self._held
        blocks, sizes = self.arena.blocks, self.arena.table.sizes(symbols)
        return [blocks[p.chunk][p.offset : p.offset + size] for p, size in zip(plan.places, sizes, strict=True)]
