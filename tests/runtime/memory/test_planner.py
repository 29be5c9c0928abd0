"""The memory planner: what no plan may do, over random lifetimes and sizes, and what each strategy promises."""

from __future__ import annotations

from itertools import combinations, permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.runtime.memory import planner as memory_planner
from turbo_tvm.runtime.memory.planner import (
    ALIGNMENT,
    PAGE,
    SMALLEST_CHUNK,
    STRATEGIES,
    TURBO_CHUNK,
    Chunk,
    Place,
    Plan,
    Record,
    aligned,
    chunk_class,
    lower_bound,
    plan,
    pooled,
    turbo2021,
)

records = st.tuples(st.integers(0, 30), st.sampled_from([0, 0, 1, 1, 2, 3, 8, 30])).map(
    lambda pair: Record(pair[0], pair[0] + pair[1])
)
sizes = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 4096]), st.integers(0, 5 << 20))
tensors = st.lists(st.tuples(records, sizes), max_size=40)
held = st.lists(st.sampled_from([64, 4096, 1 << 16, 1 << 20, TURBO_CHUNK, 5 << 20, 1 << 25]), max_size=5)


def together(a: Record, b: Record) -> bool:
    return a.first <= b.last and b.first <= a.last


def check(found: Plan, table: list[Record], wanted: list[int], held_chunks: list[int]) -> None:
    """What holds for every plan: nothing overlaps in time and memory, offsets are aligned, chunks are what they say."""
    assert len(found.places) == len(table)
    for chunk in found.chunks:
        assert chunk.held is None or chunk.size == held_chunks[chunk.held]
    kept = [c.held for c in found.chunks if c.held is not None]
    assert len(set(kept)) == len(kept)
    for place, size in zip(found.places, wanted, strict=True):
        assert place.offset >= 0 and place.offset % ALIGNMENT == 0
        if size:
            assert place.offset + size <= found.chunks[place.chunk].size
    for (a, b), (p, q), (s, t) in zip(
        combinations(table, 2), combinations(found.places, 2), combinations(wanted, 2), strict=True
    ):
        if together(a, b) and p.chunk == q.chunk and s and t:
            assert p.offset + s <= q.offset or q.offset + t <= p.offset
    assert found.lower_bound == lower_bound(table, [aligned(s) for s in wanted])
    assert found.bytes_held >= found.peak >= found.lower_bound


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=300, deadline=None)
@given(tensors, held)
def test_tensors_that_live_at_once_never_overlap(strategy, tensors, held):
    table, wanted = [t[0] for t in tensors], [t[1] for t in tensors]
    check(STRATEGIES[strategy](table, wanted, held), table, wanted, held)


@settings(max_examples=100, deadline=None)
@given(tensors)
def test_the_lower_bound_is_the_fullest_step(tensors):
    table, wanted = [t[0] for t in tensors], [t[1] for t in tensors]
    steps = range(max((r.last for r in table), default=0) + 1)
    alive = [sum(s for r, s in zip(table, wanted, strict=True) if r.first <= now <= r.last) for now in steps]
    assert lower_bound(table, wanted) == max(alive)


@settings(max_examples=100, deadline=None)
@given(tensors)
def test_a_compact_plan_fits_the_chunk_that_it_asked_for(tensors):
    """The same batch again takes the chunk that is there, at the same places."""
    table, wanted = [t[0] for t in tensors], [t[1] for t in tensors]
    first = plan(table, wanted)
    again = plan(table, wanted, [c.size for c in first.chunks])
    assert again.places == first.places
    assert [c.held for c in again.chunks] == list(range(len(first.chunks)))


def encoder(layers: int, in_place: bool = True) -> tuple[list[Record], list[int]]:
    """Lifetimes of an encoder's tensors, and columns: hidden 768, merged q, k, v, attention, inner 3,088."""
    table, columns, hidden, step = [], [], [0, 0], 1
    for _ in range(layers):
        table += [Record(step, step + 1), Record(step + 1, step + 2), Record(step + 3, step + 4)]
        columns += [2304, 768, 3088]
        if not in_place:
            table += [Record(hidden[0], step + 2), Record(step + 2, step + 4)]
            columns += [768, 768]
            hidden = [step + 4, step + 4]
        step += 4
    table.append(Record(hidden[0], step + 1))
    columns.append(768)
    return table, columns


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("layers", [1, 12, 48])
def test_an_encoder_needs_no_more_than_the_lower_bound(layers, in_place):
    table, columns = encoder(layers, in_place)
    for tiles in (1, 2, 17, 128, 1024):
        found = plan(table, [tiles * 4 * 4 * c for c in columns])
        assert found.peak <= 1.05 * found.lower_bound
        check(found, table, [tiles * 4 * 4 * c for c in columns], [])


def best_of_all_orders(table: list[Record], wanted: list[int]) -> int:
    """The least peak there is: some order in which each tensor takes the lowest free offset reaches it."""
    best = sum(wanted)
    for order in permutations(range(len(table))):
        spans: dict[int, tuple[int, int]] = {}
        for i in order:
            lowest = 0
            for begin, end in sorted(spans[j] for j in spans if together(table[i], table[j])):
                if begin - lowest >= wanted[i]:
                    break
                lowest = max(lowest, end)
            spans[i] = lowest, lowest + wanted[i]
        best = min(best, max(end for _, end in spans.values()))
    return best


def test_a_few_tensors_are_placed_nearly_as_well_as_can_be():
    ratios = []
    for seed in range(300):
        draw = Random(seed)
        table = [Record(first, first + draw.choice([0, 0, 1, 2, 3, 8])) for first in draw.choices(range(9), k=6)]
        wanted = [ALIGNMENT * draw.randint(1, 6) for _ in table]
        ratios.append(plan(table, wanted).peak / best_of_all_orders(table, wanted))
    assert min(ratios) == 1.0 and max(ratios) <= 1.2 and sum(r > 1 for r in ratios) <= 3


def test_moving_forward_what_sticks_out_beats_every_order():
    table = [Record(*r) for r in [(0, 3), (5, 8), (8, 9), (3, 5), (4, 4)]]
    wanted = [ALIGNMENT * n for n in (2, 2, 5, 2, 4)]
    conflicts = memory_planner._conflicts(tuple(table))
    orders = memory_planner._orders(conflicts, wanted)
    peaks = [memory_planner._in_order(order, conflicts.neighbours, wanted)[1] for order in orders]
    assert min(peaks) == 8 * ALIGNMENT
    assert plan(table, wanted).peak == lower_bound(table, wanted) == 7 * ALIGNMENT


class TestNothingMuch:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_no_tensors(self, strategy):
        assert STRATEGIES[strategy]([], [], []) == Plan((), (), 0, 0)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_one_tensor(self, strategy):
        found = STRATEGIES[strategy]([Record(3, 3)], [100], [])
        assert found.places == (Place(0, 0),) and found.lower_bound == 128
        check(found, [Record(3, 3)], [100], [])

    def test_tensors_without_bytes_take_nothing(self):
        found = plan([Record(0, 9), Record(2, 3)], [0, 0])
        assert (found.peak, found.chunks, found.places) == (0, (), (Place(0, 0), Place(0, 0)))

    @pytest.mark.parametrize(
        ("table", "wanted", "message"),
        [
            ([Record(0, 0)], [], "0 sizes for 1 records"),
            ([Record(0, 0)], [-1], "cannot have -1 bytes"),
            ([Record(2, 1)], [4], "from step 2 to step 1"),
        ],
    )
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_what_is_no_table_is_refused(self, strategy, table, wanted, message):
        with pytest.raises(ValueError, match=message):
            STRATEGIES[strategy](table, wanted, [])


class TestChunkClasses:
    @settings(max_examples=200, deadline=None)
    @given(st.integers(1, 1 << 40))
    def test_a_class_holds_its_size_and_wastes_a_quarter_at_most(self, size):
        found = chunk_class(size)
        assert found >= size and found % ALIGNMENT == 0
        assert found == SMALLEST_CHUNK or found <= 1.25 * size
        assert chunk_class(found) == found

    def test_four_classes_per_octave(self):
        between = {chunk_class(size) for size in range((1 << 20) + 1, (2 << 20) + 1, 4096)}
        assert sorted(between) == [(1 << 18) * n for n in (5, 6, 7, 8)]

    def test_the_smallest_sufficient_held_chunk_is_used(self):
        found = plan([Record(0, 0)], [1 << 20], [1 << 25, 1 << 19, 1 << 21])
        assert found.chunks == (Chunk(1 << 21, 2),)

    def test_a_chunk_that_is_too_small_is_replaced(self):
        found = plan([Record(0, 0)], [1 << 20], [1 << 19])
        assert found.chunks == (Chunk(1 << 20, None),)


class TestPublished:
    """The placement of the paper, on examples worked out by hand."""

    def test_a_new_chunk_is_2_mib_or_a_fifth_more_than_the_tensor(self):
        found = turbo2021([Record(0, 1), Record(0, 1)], [3 << 20, 1 << 20])
        assert [c.size for c in found.chunks] == [aligned(int(1.2 * (3 << 20))), TURBO_CHUNK]

    def test_the_smallest_gap_that_fits_is_taken(self):
        # placed largest first: [0, 400), [400, 700), [700, 900), [900, 1000) in units of 64 bytes; the last one meets
        # the first and the third: the gap between them is 300 wide, that behind the third is larger
        table = [Record(0, 9), Record(0, 4), Record(0, 9), Record(6, 9)]
        found = turbo2021(table, [64 * n for n in (400, 300, 200, 100)])
        assert [p.offset // 64 for p in found.places] == [0, 400, 700, 400]

    def test_chunks_that_stay_empty_are_released_at_once(self):
        found = turbo2021([Record(0, 0)], [100], [TURBO_CHUNK, 1 << 25])
        assert found.chunks == (Chunk(TURBO_CHUNK, 0),)

    def test_a_held_chunk_behind_one_that_is_too_small_is_used(self):
        found = turbo2021([Record(0, 0)], [3 << 20], [TURBO_CHUNK, 1 << 25])
        assert found.chunks == (Chunk(1 << 25, 1),) and found.places == (Place(0, 0),)


class TestPooled:
    def test_memory_is_used_again_for_the_very_same_pages_only(self):
        table = [Record(0, 1), Record(2, 3), Record(2, 3), Record(4, 4)]
        found = pooled(table, [PAGE, PAGE - 1, 2 * PAGE, 3 * PAGE])
        assert [p.chunk for p in found.places] == [0, 0, 1, 2]
        assert [c.size for c in found.chunks] == [PAGE, 2 * PAGE, 3 * PAGE]

    def test_nothing_is_ever_released(self):
        found = pooled([Record(0, 0)], [PAGE], [9 * PAGE, PAGE])
        assert found.chunks == (Chunk(9 * PAGE, 0), Chunk(PAGE, 1)) and found.places == (Place(1, 0),)
