"""The arena: what it holds, when it grows and shrinks, what it refuses; counted in bytes, without any kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.artifact.manifest import BufferSpec
from turbo_tvm.errors import InputError, MemoryBudgetError, TurboError
from turbo_tvm.runtime.memory.arena import KEPT_PLANS, STRATEGY_NAMES, WINDOW, Arena
from turbo_tvm.runtime.memory.planner import chunk_class
from turbo_tvm.runtime.memory.table import MemoryTable

LARGEST = {"token_tiles": 128, "sequence_tiles": 1}


def table(layers: int = 12) -> MemoryTable:
    """An encoder like BERT-base: hidden 768 in place throughout, and per layer q, k, v, attention and inner rows."""
    specs, step = [BufferSpec("hidden", ("token_tiles", "4", "768"), "float32", 0, 4 * layers + 1)], 1
    for layer in range(layers):
        for name, columns, first in (("qkv", 2304, 0), ("attention", 768, 1), ("inner", 3088, 3)):
            shape = ("token_tiles", "4", str(columns))
            specs.append(BufferSpec(f"{name}{layer}", shape, "float32", step + first, step + first + 1))
        step += 4
    specs.append(BufferSpec("pooled", ("sequence_tiles", "4", "768"), "float32", step, step + 1))
    return MemoryTable(specs)


TABLE = table()


def batch(tiles: int) -> dict[str, int]:
    return {"token_tiles": tiles, "sequence_tiles": 1}


class Device:
    """Counts what is alive; a block is freed when nobody refers to it. `room`: how many bytes there are."""

    def __init__(self, room: int = 1 << 40):
        self.alive, self.most, self.room = 0, 0, room

    def allocate(self, size: int) -> Device.Block:
        if self.alive + size > self.room:
            raise MemoryError(f"no {size} bytes")
        self.alive += size
        self.most = max(self.most, self.alive)
        return Device.Block(self, size)

    class Block:
        def __init__(self, device: Device, size: int):
            self.device, self.size = device, size

        def __del__(self) -> None:
            self.device.alive -= self.size


def arena(strategy: str = "compact", device: Device | None = None, budget: int | None = None) -> Arena:
    return Arena(TABLE, (device or Device()).allocate, strategy=strategy, largest=LARGEST, budget=budget)


def uniform(count: int, seed: int = 0) -> list[int]:
    return [-(-int(n) // 4) for n in np.random.default_rng(seed).integers(5, 501, count)]


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_what_is_held_is_what_is_alive(strategy):
    device = Device()
    memory = arena(strategy, device)
    for tiles in uniform(300):
        memory.hold(batch(tiles))
        did = memory.statistics
        assert memory.bytes_held == device.alive == did.bytes_allocated - did.bytes_freed
    memory.release()
    assert memory.bytes_held == device.alive == 0


@pytest.mark.parametrize("strategy", ["compact", "static", "pooled"])
def test_a_repeating_trace_allocates_nothing_after_its_first_round(strategy):
    memory = arena(strategy)
    trace = uniform(100)
    for tiles in trace:
        memory.hold(batch(tiles))
    before = memory.statistics.allocations
    for tiles in trace * (3 * WINDOW // len(trace)):
        memory.hold(batch(tiles))
    assert memory.statistics.allocations == before


def test_a_random_trace_moves_a_hundredth_of_the_published_algorithm_at_most():
    moved = {}
    for strategy in ("compact", "turbo2021"):
        memory = arena(strategy)
        for tiles in uniform(1000):
            memory.hold(batch(tiles))
        moved[strategy] = memory.statistics.bytes_allocated + memory.statistics.bytes_freed
    assert moved["compact"] <= 0.01 * moved["turbo2021"]


def test_the_chunk_grows_to_a_class_and_the_old_one_goes_first():
    device = Device()
    memory = arena(device=device)
    for tiles in (1, 20, 128):
        plan = memory.hold(batch(tiles))
        assert memory.bytes_held == chunk_class(plan.peak)
    assert device.most == memory.bytes_held


def test_the_chunk_shrinks_when_no_batch_needed_it_for_a_window():
    memory = arena()
    memory.hold(batch(128))
    large = memory.bytes_held
    for _ in range(WINDOW):
        memory.hold(batch(1))
    assert memory.bytes_held == large
    for _ in range(WINDOW):
        memory.hold(batch(1))
    assert memory.bytes_held == chunk_class(memory.peak_bytes(batch(1))) < large


def test_a_large_batch_in_every_window_keeps_its_chunk():
    memory = arena()
    memory.hold(batch(128))
    for number in range(6 * WINDOW):
        memory.hold(batch(128 if number % WINDOW == WINDOW // 2 else 1))
    assert memory.statistics.allocations == 1


def test_what_looks_at_chunks_is_forgotten_before_they_go():
    device, views = Device(), []
    memory = Arena(TABLE, device.allocate, views.clear)
    memory.hold(batch(10))
    views.append(memory.blocks[0])
    memory.hold(batch(9))
    assert views
    memory.hold(batch(100))
    assert not views and device.most == memory.bytes_held


def test_plans_of_many_shapes_do_not_pile_up():
    memory = arena()
    for tiles in range(1, 3 * KEPT_PLANS):
        memory.peak_bytes(batch(tiles))
    assert len(memory._plans) == KEPT_PLANS
    made = memory.statistics.plans
    memory.peak_bytes(batch(3 * KEPT_PLANS - 1))
    assert memory.statistics.plans == made


def test_a_failed_allocation_leaves_an_arena_that_works():
    device = Device(room=chunk_class(arena().peak_bytes(batch(20))))
    memory = arena(device=device)
    memory.hold(batch(10))
    with pytest.raises(MemoryError):
        memory.hold(batch(128))
    assert memory.bytes_held == device.alive == 0
    memory.hold(batch(20))
    assert memory.bytes_held == device.alive > 0


class TestStatic:
    def test_holds_what_the_largest_batch_needs(self):
        memory = arena("static")
        memory.hold(batch(1))
        assert memory.bytes_held == chunk_class(arena().peak_bytes(LARGEST))
        assert memory.statistics.allocations == memory.statistics.plans == 1
        places = memory.hold(batch(1)).places
        assert memory.hold(batch(128)).places == places and memory.statistics.allocations == 1

    def test_a_batch_beyond_the_largest_is_planned_by_itself(self):
        memory = arena("static")
        memory.hold(batch(1))
        assert memory.hold(batch(200)).peak == arena().peak_bytes(batch(200))

    def test_needs_a_largest_batch(self):
        with pytest.raises(TurboError, match="padded"):
            Arena(TABLE, Device().allocate, strategy="static")


def test_an_unknown_strategy_is_refused():
    with pytest.raises(TurboError, match=r"'tidy'.*compact, turbo2021, pooled, static"):
        Arena(TABLE, Device().allocate, strategy="tidy")


class TestBudget:
    @pytest.mark.parametrize("strategy", STRATEGY_NAMES)
    def test_what_does_not_fit_is_refused_and_allocates_nothing(self, strategy):
        device = Device()
        memory = arena(strategy, device, budget=100_000)
        assert not memory.fits(batch(100))
        with pytest.raises(MemoryBudgetError, match="budget is 100,000"):
            memory.hold(batch(100))
        assert device.most == 0

    def test_a_refused_batch_is_bad_input(self):
        with pytest.raises(InputError):
            arena(budget=1).hold(batch(1))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(1, 130), min_size=1, max_size=30), st.integers(1, 130), st.integers(0, 200_000))
    def test_it_is_never_exceeded_and_never_wasted(self, trace, most, more):
        """Whatever came before, a batch is answered if and only if its peak is within the budget."""
        device = Device()
        memory = arena(device=device, budget=arena().peak_bytes(batch(most)) + more)
        for tiles in trace:
            if memory.peak_bytes(batch(tiles)) <= memory.budget:
                assert memory.fits(batch(tiles))
                memory.hold(batch(tiles))
            else:
                with pytest.raises(MemoryBudgetError):
                    memory.hold(batch(tiles))
            assert device.most <= memory.budget

    def test_a_smaller_budget_shrinks_what_is_held(self):
        memory = arena()
        memory.hold(batch(128))
        memory.budget = memory.peak_bytes(batch(3))
        memory.hold(batch(3))
        assert memory.bytes_held <= memory.budget
