"""Partitions of sequences into batches, by dynamic programming: pure functions over lengths and a cost.

Few sequences. Up to `EXACT` sequences are partitioned in every way, whatever the cost: over subsets S, by the batch T
that their first member is in,

    least[S] = min over batches T of S with its first member of cost(T) + least[S without T]

Many sequences. Sorted by length, some best partition of padded batches consists of contiguous runs: if two batches
overlap in length, exchanging members makes one of them shorter and none longer. Then

    least[i] = min over j < i of least[j] + cost(lengths j .. i - 1)

finds it in O(n * longest run) steps (Fang et al., "TurboTransformers", PPoPP 2021). For other costs, and under limits
on tokens or bytes, runs are a good rule and not always the best.

A cost with a method `batches(counts, tokens, squares, longest) -> seconds` over int64 arrays, as those of `cost_model`
have it, prices a thousand sequences in milliseconds; any other is called once per batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np

from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits

EXACT = 9  # sequences that are partitioned in every way


class Cost(Protocol):
    """A prediction of the seconds that a batch of sequences of these lengths takes."""

    def __call__(self, lengths: Sequence[int], /) -> float: ...


def best_subsets(lengths: Sequence[int], cost: Cost, limits: BatchLimits) -> list[list[int]]:
    """Return the partition of the least total cost, each batch a list of indices; for up to `EXACT` sequences."""
    count = len(lengths)
    prices = _subset_prices(np.array(lengths, np.int64), cost, limits)
    least, taken = np.zeros(1 << count), np.zeros(1 << count, np.int64)
    for subsets, starts, whole, batch in _levels(count):  # by their number of members
        totals = prices[batch] + least[whole ^ batch]
        best = np.minimum.reduceat(totals, starts)
        least[subsets] = best
        sizes = np.diff(np.append(starts, len(totals)))
        hits = np.flatnonzero(totals == best.repeat(sizes))
        taken[whole[hits]] = batch[hits]
    groups, left = [], (1 << count) - 1
    while left:
        groups.append([i for i in range(count) if taken[left] >> i & 1])
        left ^= int(taken[left])
    return groups


@cache
def _levels(count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Return, for each size from 1 to `count`, the pairs (subset, batch in it) of the subsets of that many items.

    Each level has four int64 arrays: the subsets, the index of the first pair of each, and the subset and the batch of
    every pair. Sets are bit masks.
    """
    levels = []
    for size in range(1, count + 1):
        subsets = [s for s in range(1, 1 << count) if s.bit_count() == size]
        starts: list[int] = []
        whole: list[int] = []
        batch: list[int] = []
        for subset in subsets:
            starts.append(len(whole))
            first = subset & -subset
            rest = others = subset ^ first
            while True:  # every subset of the others, with the first
                whole.append(subset)
                batch.append(first | rest)
                if not rest:
                    break
                rest = (rest - 1) & others
        levels.append(tuple(np.array(x, np.int64) for x in (subsets, starts, whole, batch)))
    return levels  # type: ignore[return-value]


def _subset_prices(lengths: np.ndarray, cost: Cost, limits: BatchLimits) -> np.ndarray:
    """Return the cost of every subset as one batch, (2 ** sequences,); infinite where a limit forbids it."""
    count = len(lengths)
    counts, tokens, squares, longest = (np.zeros(1, np.int64) for _ in range(4))
    for length in lengths:  # with each further sequence: without it, then with it
        counts = np.concatenate((counts, counts + 1))
        tokens = np.concatenate((tokens, tokens + length))
        squares = np.concatenate((squares, squares + length * length))
        longest = np.concatenate((longest, np.maximum(longest, length)))
    allowed = counts > 0
    if limits.max_batch is not None:
        allowed &= counts <= limits.max_batch
    if limits.max_tokens is not None:
        allowed &= (tokens <= limits.max_tokens) | (counts == 1)

    def members(subset: int) -> list[int]:
        return [int(lengths[i]) for i in range(count) if subset >> i & 1]

    if limits.max_bytes is not None:
        for subset in np.flatnonzero(allowed & (counts > 1)).tolist():
            allowed[subset] = limits.fits_memory(members(subset))
    batches = getattr(cost, "batches", None)
    prices = np.full(1 << count, math.inf)
    if batches is not None:
        prices[allowed] = batches(counts[allowed], tokens[allowed], squares[allowed], longest[allowed])
    else:
        for subset in np.flatnonzero(allowed).tolist():
            prices[subset] = cost(members(subset))
    return prices


def best_runs(lengths: Sequence[int], cost: Cost, limits: BatchLimits, *, weigh_waiting: bool = False) -> list[int]:
    """Return where each run begins in the partition of this order into the runs with the least sum of costs.

    weigh_waiting: a run's cost counts once for every sequence that is not answered when it starts.
    """
    count = len(lengths)
    prices = run_prices(lengths, cost, limits)
    window = prices.shape[1] if count else 0
    if weigh_waiting:
        first = np.arange(count)[:, None] - np.arange(window - 1, -1, -1)
        prices *= count - first
    least, starts = np.zeros(count + 1), [0] * (count + 1)
    for end in range(1, count + 1):
        size = min(end, window)
        totals = least[end - size : end] + prices[end - 1, window - size :]
        best = int(totals.argmin())
        least[end], starts[end] = totals[best], end - size + best
    return _begins(starts)


class EarliestRuns:
    """Runs of a growing order that finish as early as can be, each before all of its deadlines."""

    def __init__(self, cost: Cost, limits: BatchLimits):
        self._cost, self._limits = cost, limits
        self._lengths: list[int] = []
        self._due: list[float] = []
        self._finished, self._starts = [limits.now_s], [0]

    @property
    def on_time(self) -> bool:
        """Whether such runs exist for the sequences so far."""
        return math.isfinite(self._finished[-1])

    def append(self, length: int, due_s: float) -> None:
        """Add a sequence, due no earlier than those before."""
        self._lengths.append(length)
        self._due.append(due_s)
        self._extend(len(self._lengths))

    def remove(self, index: int) -> None:
        """Take the sequence at this index out."""
        del self._lengths[index], self._due[index]
        del self._finished[index + 1 :], self._starts[index + 1 :]
        for end in range(index + 1, len(self._lengths) + 1):
            self._extend(end)

    def starts(self) -> list[int]:
        """Return where each run begins."""
        return _begins(self._starts)

    def _extend(self, end: int) -> None:
        """Find the best run that ends here; as deadlines only grow, a run is due when its first sequence is."""
        window = min(end, self._limits.max_batch or end)
        last = self._lengths[end - window : end]
        prices = run_prices(last, self._cost, self._limits, only_last=True)[0]
        times = np.array(self._finished[end - len(prices) : end]) + prices
        times[times > np.array(self._due[end - len(prices) : end])] = math.inf
        best = int(times.argmin())
        self._finished.append(float(times[best]))
        self._starts.append(end - len(prices) + best)


def run_prices(lengths: Sequence[int], cost: Cost, limits: BatchLimits, *, only_last: bool = False) -> np.ndarray:
    """Return the cost of every run, float64 (sequences, window).

    Row i holds, from the right, the runs of 1, 2, ... sequences that end with sequence i; infinite where there is no
    such run, or a limit forbids it. only_last: return the last row alone, (1, window).
    """
    runs = _Runs(np.array(lengths, np.int64), _window(lengths, limits), only_last)
    allowed = runs.exists
    if limits.max_tokens is not None:
        allowed &= (runs.tokens <= limits.max_tokens) | (runs.counts == 1)
    if limits.max_bytes is not None:
        allowed &= _within_bytes(lengths, runs.window, limits)[-len(allowed) :]
    batches = getattr(cost, "batches", None)
    if batches is not None:
        return np.where(allowed, batches(runs.counts, runs.tokens, runs.squares, runs.longest), math.inf)
    prices = np.full(allowed.shape, math.inf)
    for i, k in zip(*np.nonzero(allowed), strict=True):
        end = i + 1 if not only_last else len(lengths)
        prices[i, k] = cost(lengths[end - (runs.window - k) : end])
    return prices


def _window(lengths: Sequence[int], limits: BatchLimits) -> int:
    """Return the longest run that the limits can allow."""
    window = min(len(lengths), limits.max_batch or len(lengths))
    if limits.max_tokens is None or not window:
        return window
    shortest = np.sort(np.array(lengths, np.int64))[:window].cumsum()
    return max(1, int(np.searchsorted(shortest, limits.max_tokens, "right")))


class _Runs:
    """Counts, tokens, squared lengths and longest length of all runs, each (sequences, window) as in `run_prices`."""

    def __init__(self, lengths: np.ndarray, window: int, only_last: bool):
        self.window = window
        sizes = np.arange(window, 0, -1)
        ends = np.arange(len(lengths) if only_last else 1, len(lengths) + 1)[:, None]
        self.exists = ends >= sizes
        starts = np.maximum(ends - sizes, 0)
        self.counts = ends - starts
        self.tokens, self.squares = (s[ends] - s[starts] for s in (_sums(lengths), _sums(lengths * lengths)))
        if only_last:
            self.longest = np.maximum.accumulate(lengths[::-1])[:window][::-1][None]
        elif (lengths[1:] >= lengths[:-1]).all():  # in order of length the last one is the longest
            self.longest = np.broadcast_to(lengths[:, None], self.tokens.shape)
        else:
            self.longest = _longest(lengths, window)


def _longest(lengths: np.ndarray, window: int) -> np.ndarray:
    found = np.empty((len(lengths), window), np.int64)
    found[:, -1:] = lengths[:, None]
    for size in range(1, window):
        column = window - 1 - size
        found[:, column] = found[:, column + 1]
        np.maximum(found[size:, column], lengths[:-size], out=found[size:, column])
    return found


def _sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], values.cumsum()))


def _within_bytes(lengths: Sequence[int], window: int, limits: BatchLimits) -> np.ndarray:
    """Return which runs are within the limit on bytes, bool (sequences, window).

    A run within another needs no more than that, so its two ends move in turn.
    """
    within = np.zeros((len(lengths), window), bool)
    start = 0
    for end in range(1, len(lengths) + 1):
        start = max(start, end - window)
        while end - start > 1 and not limits.fits_memory(lengths[start:end]):
            start += 1
        within[end - 1, window - (end - start) :] = True
    return within


def _begins(starts: Sequence[int]) -> list[int]:
    """Follow the chosen starts back from the end."""
    begins, end = [], len(starts) - 1
    while end:
        end = starts[end]
        begins.append(end)
    return begins[::-1]
