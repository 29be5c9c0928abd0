"""The memory planner: where every intermediate tensor of a run lies, for one batch shape. Pure functions.

A record says when a tensor lives, from the step that writes it to the last that reads it; its size comes with the
batch. A plan gives each tensor a chunk of memory and an offset in it, such that no two tensors that live at once
overlap.

    plan(records, sizes, held_chunks)              the default, "compact"
    STRATEGIES["turbo2021"](records, sizes, ...)   and the others

- `compact`: one chunk. Tensors are placed one by one at the lowest offset that is free over their lifetime, in several
  orders (largest first, longest-lived first, ...), until the peak is the lower bound, the most bytes alive in any step,
  which no plan can beat. If no order gets there, the tensors that stick out are moved forward, a bounded number of
  times. The chunk's size is one of a few classes.
- `turbo2021`: the published placement (Fang et al., "TurboTransformers", PPoPP 2021): largest first, the smallest gap
  in any chunk, else the chunk's tail, else a new chunk of max(2 MiB, 1.2 x size); a chunk that stays empty is released
  at once.
- `pooled`: every tensor by itself, in memory of its own size in whole pages, given back after its last reader and never
  released: TVM's pooled allocator.

A fourth choice, "static", is `compact` for the largest batch: see `arena.py`.

Lifetimes are the same for all shapes, so what follows from them alone, which tensors live at the same time, is worked
out once per table of records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

ALIGNMENT = 64  # bytes; vector kernels use aligned stores
SMALLEST_CHUNK = 64 << 10
CLASSES_PER_OCTAVE = 4  # chunk sizes: 4, 5, 6, 7 times a power of two

TURBO_CHUNK, TURBO_SLACK = 2 << 20, 1.2  # bytes; DEFAULT_CHUNK_SIZE and K_SCALE of the paper
PAGE = 4096  # bytes: what TVM's pooled allocator rounds up to

_MOVES = 12  # placements that try to get below the best order's peak


class Record(NamedTuple):
    """The lifetime of a tensor: the first and the last step, inclusive, in which it must keep its place."""

    first: int
    last: int


class Place(NamedTuple):
    """Where a tensor lies: the number of a chunk of the plan, and the offset in bytes."""

    chunk: int
    offset: int


class Chunk(NamedTuple):
    """A piece of memory that a plan uses."""

    size: int  # bytes
    held: int | None  # the index of the held chunk that it is; None for a new one


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a batch lie."""

    places: tuple[Place, ...]  # of every record, in order
    chunks: tuple[Chunk, ...]  # to hold from now on; held chunks that are not among them are freed
    peak: int  # bytes up to the end of the last tensor, over all chunks
    lower_bound: int  # the most bytes alive in any step

    @property
    def bytes_held(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.size for chunk in self.chunks)


Strategy = Callable[[Sequence[Record], Sequence[int], Sequence[int]], Plan]


def plan(records: Sequence[Record], sizes: Sequence[int], held_chunks: Sequence[int] = ()) -> Plan:
    """Place tensors of these sizes in bytes in one chunk: the strategy "compact".

    held_chunks: bytes of the chunks that are there. The smallest one that suffices is used; if none does, a new one is
    asked for, of a size of `chunk_class`.
    """
    sizes = _checked(records, sizes)
    bound = lower_bound(records, sizes)
    offsets, peak = _place_all(_conflicts(tuple(records)), sizes, bound)
    fitting = [(size, index) for index, size in enumerate(held_chunks) if size >= peak]
    chunk = Chunk(*min(fitting)) if fitting else Chunk(chunk_class(peak), None)
    return Plan(tuple(Place(0, offset) for offset in offsets), (chunk,) if peak else (), peak, bound)


def turbo2021(records: Sequence[Record], sizes: Sequence[int], held_chunks: Sequence[int] = ()) -> Plan:
    """Place tensors as published, greedily by size in chunks: the strategy "turbo2021"."""
    sizes = _checked(records, sizes)
    neighbours = _conflicts(tuple(records)).neighbours
    chunks = [Chunk(size, index) for index, size in enumerate(held_chunks)]
    places: dict[int, Place] = {}
    for i in sorted(range(len(records)), key=lambda i: (-sizes[i], i)):
        found = _published_fit(i, sizes, neighbours[i], chunks, places)
        if found is None:
            chunks.append(Chunk(aligned(max(TURBO_CHUNK, int(TURBO_SLACK * sizes[i]))), None))
            found = Place(len(chunks) - 1, 0)
        places[i] = found
    return _without_empty(records, sizes, chunks, [places[i] for i in range(len(records))])


def pooled(records: Sequence[Record], sizes: Sequence[int], held_chunks: Sequence[int] = ()) -> Plan:
    """Place every tensor by itself, as TVM's pooled allocator does: in whole pages, in memory of the same size."""
    sizes = _checked(records, sizes)
    chunks = [Chunk(size, index) for index, size in enumerate(held_chunks)]
    until = [-1] * len(chunks)  # the last step of the tensor that lies in each
    places: dict[int, Place] = {}
    for i in sorted(range(len(records)), key=lambda i: records[i].first):
        size = -(-sizes[i] // PAGE) * PAGE
        fitting = [c for c, chunk in enumerate(chunks) if chunk.size == size and until[c] < records[i].first]
        if not fitting:
            chunks.append(Chunk(size, None))
            until.append(-1)
        number = fitting[0] if fitting else len(chunks) - 1
        until[number] = records[i].last
        places[i] = Place(number, 0)
    ordered = tuple(places[i] for i in range(len(records)))
    used = {place.chunk for place in ordered}
    return Plan(ordered, tuple(chunks), sum(chunks[c].size for c in used), lower_bound(records, sizes))


STRATEGIES: dict[str, Strategy] = {"compact": plan, "turbo2021": turbo2021, "pooled": pooled}
COMPACT = ("compact", "static")  # the strategies with one chunk, where a tensor may take the place of one that dies


def lower_bound(records: Sequence[Record], sizes: Sequence[int]) -> int:
    """Return the most bytes that are alive in any step: no plan can have a smaller peak."""
    change: dict[int, int] = {}
    for record, size in zip(records, sizes, strict=True):
        change[record.first] = change.get(record.first, 0) + size
        change[record.last + 1] = change.get(record.last + 1, 0) - size
    most = alive = 0
    for step in sorted(change):
        alive += change[step]
        most = max(most, alive)
    return most


def aligned(size: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def chunk_class(size: int) -> int:
    """Return the next of a few chunk sizes, 4, 5, 6 or 7 times a power of two: growth lands on the same sizes again."""
    if size <= SMALLEST_CHUNK:
        return SMALLEST_CHUNK
    step = 1 << max((size - 1).bit_length() - CLASSES_PER_OCTAVE.bit_length(), 0)
    return -(-size // step) * step


class _Conflicts(NamedTuple):
    """What follows from the lifetimes of records alone, each by a record's index."""

    neighbours: tuple[tuple[int, ...], ...]  # the records that live at the same time
    lifetimes: tuple[int, ...]  # steps
    firsts: tuple[int, ...]  # first steps


@lru_cache(maxsize=64)
def _conflicts(records: tuple[Record, ...]) -> _Conflicts:
    neighbours: list[list[int]] = [[] for _ in records]
    alive: list[int] = []
    for i in sorted(range(len(records)), key=lambda i: records[i].first):
        alive = [j for j in alive if records[j].last >= records[i].first]
        for j in alive:
            neighbours[i].append(j)
            neighbours[j].append(i)
        alive.append(i)
    lifetimes = tuple(r.last - r.first + 1 for r in records)
    return _Conflicts(tuple(map(tuple, neighbours)), lifetimes, tuple(r.first for r in records))


def _place_all(conflicts: _Conflicts, sizes: Sequence[int], bound: int) -> tuple[list[int], int]:
    """Return offsets and peak of the first order that reaches the bound, else of the best order after some moves."""
    best: tuple[list[int], int] | None = None
    order: Sequence[int] = ()
    for tried in _orders(conflicts, sizes):
        found = _in_order(tried, conflicts.neighbours, sizes)
        if best is None or found[1] < best[1]:
            best, order = found, tried
        if found[1] == bound:
            return found
    assert best is not None
    offsets = best[0]
    for _ in range(_MOVES):
        # a tensor that sticks out above the bound was placed too late (Joslin, Clements, "Squeaky wheel", 1999)
        late = {i for i in order if offsets[i] + sizes[i] > bound}
        order = sorted(order, key=lambda i: i not in late)
        offsets, reached = _in_order(order, conflicts.neighbours, sizes)
        if reached < best[1]:
            best = offsets, reached
        if reached == bound:
            break
    return best


def _orders(conflicts: _Conflicts, sizes: Sequence[int]) -> Iterator[list[int]]:
    lifetimes, firsts = conflicts.lifetimes, conflicts.firsts
    everyone = range(len(sizes))
    yield sorted(everyone, key=lambda i: (-sizes[i], -lifetimes[i], i))
    yield sorted(everyone, key=lambda i: (-lifetimes[i], -sizes[i], i))
    yield sorted(everyone, key=lambda i: (-lifetimes[i] * sizes[i], i))
    yield sorted(everyone, key=lambda i: (firsts[i], -lifetimes[i], i))
    yield sorted(everyone, key=lambda i: (-sizes[i] - sum(sizes[j] for j in conflicts.neighbours[i]), -sizes[i], i))


def _in_order(order: Sequence[int], neighbours: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Place each tensor at the lowest offset that is free while it lives; return offsets and peak."""
    offsets = [-1] * len(sizes)
    peak = 0
    for i in order:
        size, lowest = sizes[i], 0
        taken = sorted([(offsets[j], offsets[j] + sizes[j]) for j in neighbours[i] if offsets[j] >= 0 and sizes[j]])
        if size:
            for begin, end in taken:
                if begin - lowest >= size:
                    break
                lowest = max(lowest, end)
        offsets[i] = lowest if size else 0
        peak = max(peak, offsets[i] + size)
    return offsets, peak


def _published_fit(
    i: int, sizes: Sequence[int], neighbours: Sequence[int], chunks: Sequence[Chunk], places: dict[int, Place]
) -> Place | None:
    """Return the smallest gap of the first chunk that has one, else its tail if that suffices."""
    for number, chunk in enumerate(chunks):
        taken = sorted((places[j].offset, sizes[j]) for j in neighbours if j in places and places[j].chunk == number)
        smallest, found, end = chunk.size + 1, -1, 0
        for begin, size in taken:
            if sizes[i] <= begin - end < smallest:
                smallest, found = begin - end, end
            end = max(end, begin + size)
        if found >= 0:
            return Place(number, found)
        if end + sizes[i] <= chunk.size:
            return Place(number, end)
    return None


def _without_empty(
    records: Sequence[Record], sizes: Sequence[int], chunks: Sequence[Chunk], places: Sequence[Place]
) -> Plan:
    used = sorted({place.chunk for place, size in zip(places, sizes, strict=True) if size})
    number = {old: new for new, old in enumerate(used)}
    ends = [0] * len(used)
    for place, size in zip(places, sizes, strict=True):
        if size:
            ends[number[place.chunk]] = max(ends[number[place.chunk]], place.offset + size)
    moved = tuple(Place(number.get(p.chunk, 0), p.offset if p.chunk in number else 0) for p in places)
    return Plan(moved, tuple(chunks[c] for c in used), sum(ends), lower_bound(records, sizes))


def _checked(records: Sequence[Record], sizes: Sequence[int]) -> list[int]:
    """Return the sizes rounded up to the alignment. Raises ValueError for what is no size or no lifetime."""
    if len(records) != len(sizes):
        raise ValueError(f"there are {len(sizes)} sizes for {len(records)} records")
    if any(size < 0 for size in sizes):
        raise ValueError(f"a tensor cannot have {min(sizes)} bytes")
    for record in records:
        if record.last < record.first:
            raise ValueError(f"a tensor cannot live from step {record.first} to step {record.last}")
    return [aligned(size) for size in sizes]
