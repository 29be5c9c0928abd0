"""The arena: the memory of a compiled function's intermediates and outputs, as plans ask for it.

The first batch of a shape is planned; a plan says which chunks of memory are held and where in them each tensor lies.
Plans and the tensors made from them are kept for recent shapes, so that a shape that was seen costs a look-up.

The strategy "compact" has hysteresis: its chunk grows at once, to the next of a few sizes, when a batch needs more. It
shrinks only when none of the last `WINDOW` batches needed as much. The old chunk is freed before the new one is
allocated: no tensor outlives a run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from turbo_tvm.errors import MemoryBudgetError, TurboError
from turbo_tvm.runtime.memory.planner import ALIGNMENT, COMPACT, STRATEGIES, Chunk, Plan, chunk_class
from turbo_tvm.runtime.memory.table import MemoryTable, Symbols

STRATEGY_NAMES = (*STRATEGIES, "static")
WINDOW = 512  # batches
KEPT_PLANS = 256

Block = TypeVar("Block")


@dataclass
class MemoryStatistics:
    """What an arena has done since it was made."""

    allocations: int = 0  # chunks
    bytes_allocated: int = 0
    bytes_freed: int = 0
    plans: int = 0  # for batches of a shape not seen lately


class Chunks(Generic[Block]):
    """The chunks that are held, on any device: `allocate(bytes)` makes one, dropping it frees it.

    forget: called before anything is freed, to drop every view of it.
    """

    def __init__(self, allocate: Callable[[int], Block], forget: Callable[[], None], statistics: MemoryStatistics):
        self.sizes: tuple[int, ...] = ()
        self.blocks: list[Block] = []
        self._allocate, self._forget = allocate, forget
        self._statistics = statistics

    def hold(self, chunks: Sequence[Chunk]) -> None:
        """Hold these chunks from now on, in this order; others are freed before any is allocated.

        If an allocation fails, nothing is held afterwards, and its error goes on.
        """
        if [c.held for c in chunks] == list(range(len(self.sizes))):
            return
        self._forget()
        kept = {c.held: self.blocks[c.held] for c in chunks if c.held is not None}
        self._statistics.bytes_freed += sum(size for i, size in enumerate(self.sizes) if i not in kept)
        self.blocks, self.sizes = [], ()
        try:
            made = [self._make(c.size) if c.held is None else kept[c.held] for c in chunks]
        except BaseException:
            self._statistics.bytes_freed = self._statistics.bytes_allocated
            raise
        self.blocks, self.sizes = made, tuple(c.size for c in chunks)

    def _make(self, size: int) -> Block:
        block = self._allocate(size)
        self._statistics.allocations += 1
        self._statistics.bytes_allocated += size
        return block


class Arena(Generic[Block]):
    """Plans batches and holds the memory that they need. Not thread-safe: its executor takes turns.

    table: the buffers.
    allocate: makes an aligned block of a number of bytes.
    forget: called before blocks are freed.
    strategy: one of STRATEGY_NAMES.
    largest: the symbols of the largest batch, for the strategy "static".
    budget: the most bytes that may be held, None for any number; it may be changed between runs.
    """

    def __init__(
        self,
        table: MemoryTable,
        allocate: Callable[[int], Block],
        forget: Callable[[], None] = lambda: None,
        *,
        strategy: str = "compact",
        largest: Symbols | None = None,
        budget: int | None = None,
    ):
        if strategy not in STRATEGY_NAMES:
            raise TurboError(f"there is no memory strategy {strategy!r}; use one of {', '.join(STRATEGY_NAMES)}")
        if strategy == "static" and largest is None:
            raise TurboError(
                "the memory strategy 'static' plans for the largest batch, and a padded model has none: use 'compact'"
            )
        self.table, self.strategy, self.budget = table, strategy, budget
        self.statistics = MemoryStatistics()
        self._place = STRATEGIES["compact" if strategy == "static" else strategy]
        self._largest = largest
        self._chunks = Chunks(allocate, forget, self.statistics)
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()
        self._batches, self._needed = 0, 0

    @property
    def bytes_held(self) -> int:
        """Bytes of all chunks that are held."""
        return sum(self._chunks.sizes)

    @property
    def blocks(self) -> list[Block]:
        """The chunks' memory, by the number that a `Place` has for its chunk."""
        return self._chunks.blocks

    def peak_bytes(self, symbols: Symbols) -> int:
        """Return the bytes that a batch needs when nothing is held.

        Those are the bytes of its tensors if they lie in one chunk, else of whole chunks.
        """
        plan = self._planned(symbols, ())
        return plan.peak if self.strategy in COMPACT else plan.bytes_held

    def fits(self, symbols: Symbols) -> bool:
        """Return whether the batch fits the budget."""
        return self.budget is None or self.peak_bytes(symbols) <= self.budget

    def plan(self, symbols: Symbols) -> Plan:
        """Return where a batch's tensors would lie, given what is held. Raises MemoryBudgetError if it does not fit."""
        plan = self._planned(symbols, self._chunks.sizes)
        return plan if self.budget is None or plan.bytes_held <= self.budget else self._within_budget(symbols)

    def hold(self, symbols: Symbols) -> Plan:
        """Plan a batch, hold the chunks of its plan from now on, and return the plan."""
        self._settle()
        plan = self.plan(symbols)
        self._needed = max(self._needed, plan.peak)
        self._chunks.hold(plan.chunks)
        return plan

    def release(self) -> None:
        """Free every chunk."""
        self._chunks.hold(())

    def _planned(self, symbols: Symbols, held: tuple[int, ...]) -> Plan:
        used = symbols if self.strategy != "static" or not self._within(symbols) else self._largest
        key = (*used.values(), held)  # type: ignore[union-attr]
        if key not in self._plans:
            self.statistics.plans += 1
            self._plans[key] = self._place(self.table.records, self.table.sizes(used), held)  # type: ignore[arg-type]
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _within(self, symbols: Symbols) -> bool:
        return self._largest is not None and all(symbols[s] <= most for s, most in self._largest.items())

    def _within_budget(self, symbols: Symbols) -> Plan:
        """Return a plan on new chunks that are no larger than they must be."""
        plan, budget = self._planned(symbols, ()), self.budget or 0
        if self.strategy in COMPACT and plan.chunks:
            room = budget // ALIGNMENT * ALIGNMENT
            plan = replace(plan, chunks=(Chunk(max(plan.peak, min(plan.chunks[0].size, room)), None),))
        if plan.bytes_held > budget:
            raise MemoryBudgetError(
                f"a batch of this shape needs {plan.bytes_held:,} bytes for what lies between its kernels, and the "
                f"budget is {budget:,}: send fewer or shorter sequences at once, or raise memory_budget"
                + (" (the plan 'static' is that of the largest batch)" if self.strategy == "static" else "")
            )
        return plan

    def _settle(self) -> None:
        """Count a batch; every `WINDOW` batches, shrink to what these needed."""
        self._batches += 1
        if self._batches % WINDOW or self.strategy != "compact":
            return
        needed, self._needed = chunk_class(self._needed), 0
        if needed < self.bytes_held:
            self._chunks.hold((Chunk(needed, None),))
