"""Splitting a batch that is too large to run at once into groups, by tokens and by memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from turbo_tvm.runtime.batch import Batch


class MemoryLimit(Protocol):
    """What knows the memory of a batch: an executor."""

    def fits(self, lengths: Sequence[int]) -> bool: ...
    def check_memory(self, lengths: Sequence[int]) -> None: ...


def by_tokens(batch: Batch, max_tokens: int) -> Iterator[Batch]:
    """Yield the batch in consecutive parts of at most `max_tokens` tokens; a longer sequence goes alone."""
    start, total = 0, 0
    lengths = batch.lengths.tolist()
    for i, length in enumerate(lengths):
        if i > start and total + length > max_tokens:
            yield batch.part(start, i)
            start, total = i, 0
        total += length
    yield batch.part(start, len(lengths))


def by_memory(batch: Batch, memory: MemoryLimit) -> Iterator[Batch]:
    """Yield the batch in halves that fit the memory budget. Raises MemoryBudgetError for a single sequence."""
    lengths = batch.lengths.tolist()
    if len(lengths) > 1 and not memory.fits(lengths):
        yield from by_memory(batch.part(0, len(lengths) // 2), memory)
        yield from by_memory(batch.part(len(lengths) // 2, len(lengths)), memory)
    else:
        memory.check_memory(lengths)
        yield batch


def longest_that_fits(max_length: int, fits: Callable[[Sequence[int]], bool]) -> int:
    """Return the longest sequence, in tokens, that fits the memory budget, by bisection; 1 if none does."""
    low, high = 1, max_length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits([middle]) else (low, middle - 1)
    return low
