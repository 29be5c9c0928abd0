"""Counts and histograms of what an engine has done; a snapshot is plain numbers that do not change."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STEPS = 4  # buckets per factor of two: a percentile is within 19 % of its value, from above
TIME_BOUNDS_S = tuple(1e-6 * 2 ** (i / STEPS) for i in range(27 * STEPS))  # 1 us to 134 s
COUNT_BOUNDS = tuple(sorted({math.floor(2 ** (i / STEPS)) for i in range(20 * STEPS)}))  # 1 to 524,288


@dataclass(frozen=True)
class HistogramSnapshot:
    """A histogram as it was at one moment."""

    bounds: tuple[float, ...]  # upper bounds of the buckets, ascending
    counts: tuple[
        int, ...
    ]  # counts[i] values are at most bounds[i] and above bounds[i - 1]; the last are larger than all
    total: float  # sum of all values
    largest: float

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """The mean of the values; 0 where there are none."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Return the bound that this percentage of the values does not exceed; 0 where there are none."""
        wanted, seen = self.count * percent / 100, 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if count and seen >= wanted:
                return min(bound, self.largest)
        return self.largest


@dataclass
class Histogram:
    """Counts values by bucket. Not thread-safe: its owner lets one thread add at a time."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    largest: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        # the first bound that is not below the value
        place = bisect_right(self.bounds, value)
        if place and self.bounds[place - 1] == value:
            place -= 1
        self.counts[place] += 1
        self.total += value
        self.largest = max(self.largest, value)

    def snapshot(self) -> HistogramSnapshot:
        """Return the counts as they are now."""
        return HistogramSnapshot(tuple(self.bounds), tuple(self.counts), self.total, self.largest)


@dataclass(frozen=True)
class BatchRecord:
    """A batch that ran, for observers of an engine."""

    lengths: tuple[int, ...]  # tokens of each sequence
    rows: int  # token rows that were computed
    seconds: float  # that it took
    predicted_s: float  # by the engine's cost
    waited_s: tuple[float, ...]  # how long each sequence had waited when the batch began


@dataclass(frozen=True)
class EngineStatistics:
    """Counts since the engine started.

    Every request that was submitted is answered, failed, cancelled, expired or pending.
    """

    submitted: int
    answered: int
    cache_hits: int  # answered from the cache, without waiting
    shared: int  # answered by the computation of an identical request that was under way
    late: int  # answered after their deadline
    failed: int
    cancelled: int
    expired: int
    rejected: int  # refused for a full queue; they do not count as submitted
    pending: int
    batches: int  # runs of a model
    retries: int  # requests that ran again alone because their batch had failed
    rows: int  # token rows that were computed
    padding_rows: int  # of them those that belong to no request
    queue_s: HistogramSnapshot  # from submission to the start of the run that answers
    execution_s: HistogramSnapshot  # of a batch
    latency_s: HistogramSnapshot  # from submission to answer, of all that were answered
    batch_size: HistogramSnapshot  # sequences
    batch_tokens: HistogramSnapshot

    @property
    def padding_waste(self) -> float:
        """The fraction of the computed rows that belong to no request."""
        return self.padding_rows / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        """Summarise the counts in two lines for a log."""
        latency, size = self.latency_s, self.batch_size
        answered = (
            f"{self.answered} answered ({self.cache_hits} from the cache, {self.shared} shared, {self.late} late)"
        )
        return (
            f"{self.submitted} requests: {answered}, {self.failed} failed, {self.cancelled} cancelled, "
            f"{self.expired} expired, {self.rejected} rejected, {self.pending} pending\n"
            f"latency p50 {1e3 * latency.percentile(50):.3g} ms, p99 {1e3 * latency.percentile(99):.3g} ms; "
            f"{self.batches} batches of {size.mean:.1f} on average, {self.padding_waste:.1%} padding"
        )


class Recorder:
    """The counts and histograms of a live engine, protected by the lock of its queue."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self.histograms = {name: Histogram(bounds) for name, bounds in _HISTOGRAMS.items()}

    def count(self, name: str, by: int = 1) -> None:
        """Increase one of the counts."""
        self.counts[name] += by

    def add(self, name: str, value: float) -> None:
        """Add a value to one of the histograms."""
        self.histograms[name].add(value)

    def snapshot(self) -> EngineStatistics:
        """Return the statistics as they are now."""
        c = self.counts
        pending = c["submitted"] - c["answered"] - c["failed"] - c["cancelled"] - c["expired"]
        fields: dict[str, Any] = {name: histogram.snapshot() for name, histogram in self.histograms.items()}
        return EngineStatistics(**c, pending=pending, **fields)  # type: ignore[arg-type]


_COUNTS = (
    *("submitted", "answered", "cache_hits", "shared", "late", "failed", "cancelled", "expired", "rejected"),
    *("batches", "retries", "rows", "padding_rows"),
)
_HISTOGRAMS: Mapping[str, Sequence[float]] = {
    "queue_s": TIME_BOUNDS_S,
    "execution_s": TIME_BOUNDS_S,
    "latency_s": TIME_BOUNDS_S,
    "batch_size": COUNT_BOUNDS,
    "batch_tokens": COUNT_BOUNDS,
}
