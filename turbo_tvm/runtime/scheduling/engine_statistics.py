"""What an engine has done: counts and histograms, as plain numbers that do not change once they are taken."""

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
    """counts[i] values are at most bounds[i] and above the bound before; the last count is of all that are larger."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    largest: float

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Their mean; 0 where there are none."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """The bound that so many percent of the values do not exceed; 0 where there are none."""
        wanted, seen = self.count * percent / 100, 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if count and seen >= wanted:
                return min(bound, self.largest)
        return self.largest


@dataclass
class Histogram:
    """Counts values by bucket. The owner sees to it that one thread adds at a time."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    largest: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """One more value."""
        # the first bound that is not below the value
        place = bisect_right(self.bounds, value)
        if place and self.bounds[place - 1] == value:
            place -= 1
        self.counts[place] += 1
        self.total += value
        self.largest = max(self.largest, value)

    def snapshot(self) -> HistogramSnapshot:
        """The counts as they are now."""
        return HistogramSnapshot(tuple(self.bounds), tuple(self.counts), self.total, self.largest)


@dataclass(frozen=True)
class BatchRecord:
    """A run of a model, as whoever watches an engine is told of it.

    lengths: tokens of each sequence; rows: token rows that were computed; seconds: what it took; predicted_s: what the
    engine took it to cost; waited_s: how long each sequence had waited when it began.
    """

    lengths: tuple[int, ...]
    rows: int
    seconds: float
    predicted_s: float
    waited_s: tuple[float, ...]


@dataclass(frozen=True)
class EngineStatistics:
    """Since the engine started. Every request that was submitted has one of the outcomes, or is pending.

    Outcomes: answered (of them cache_hits without waiting, shared with a request that was under way already, late after
    its deadline), failed, cancelled, expired. rejected: refused for a full queue, which are not submitted. batches:
    runs of a model; retries: requests that ran again alone as their batch had failed. rows: token rows that were
    computed; padding_rows: of them those that no request asked for. Histograms in seconds: queue (from submission to
    the start of the run that answers), execution (of a batch), latency (from submission to answer, of all answered).
    """

    submitted: int
    answered: int
    cache_hits: int
    shared: int
    late: int
    failed: int
    cancelled: int
    expired: int
    rejected: int
    pending: int
    batches: int
    retries: int
    rows: int
    padding_rows: int
    queue_s: HistogramSnapshot
    execution_s: HistogramSnapshot
    latency_s: HistogramSnapshot
    batch_size: HistogramSnapshot
    batch_tokens: HistogramSnapshot

    @property
    def padding_waste(self) -> float:
        """The fraction of the computed rows that no request asked for."""
        return self.padding_rows / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        """Two lines for a log."""
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
    """Counts for an engine; the engine's lock protects it."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self.histograms = {name: Histogram(bounds) for name, bounds in _HISTOGRAMS.items()}

    def count(self, name: str, by: int = 1) -> None:
        """So many more of one of the counts."""
        self.counts[name] += by

    def add(self, name: str, value: float) -> None:
        """One more value in a histogram."""
        self.histograms[name].add(value)

    def snapshot(self) -> EngineStatistics:
        """The statistics as they are now."""
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
