"""Streams of requests for the simulator and for benchmarks: when each arrives, and how long it is."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

import numpy as np

from turbo_tvm.errors import InputError


@dataclass(frozen=True)
class Trace:
    """A stream of requests. Raises InputError for one that is empty, or whose times or lengths are none."""

    arrival_s: np.ndarray  # float64 (requests,), seconds, never decreasing
    lengths: np.ndarray  # int64 (requests,), tokens

    def __post_init__(self) -> None:
        times, lengths = self.arrival_s, self.lengths
        if times.shape != lengths.shape or times.ndim != 1 or not len(times):
            raise InputError(f"a trace needs as many times as lengths, not {times.shape} and {lengths.shape}")
        if not (np.isfinite(times).all() and (np.diff(times) >= 0).all()):
            raise InputError("the times of a trace are finite numbers that never decrease")
        if lengths.min() < 1:
            raise InputError(f"the lengths of a trace are at least 1, not {lengths.min()}")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def rate(self) -> float:
        """Requests per second."""
        seconds = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / seconds if seconds > 0 else math.inf

    def at_rate(self, rate: float) -> Trace:
        """Return the same requests, faster or slower. Raises InputError if all of them come at once."""
        if not np.isfinite(self.rate):
            raise InputError("a stream whose requests all come at once has no rate to change")
        return Trace((self.arrival_s - self.arrival_s[0]) * (self.rate / rate), self.lengths)


Lengths = Callable[[np.random.Generator, int], np.ndarray]


def uniform(low: int, high: int) -> Lengths:
    """Return a source of lengths that are uniform in low..high. Raises InputError for what is no range."""
    if not 1 <= low <= high:
        raise InputError(f"lengths are a range from at least 1, not {low}..{high}")
    return lambda rng, count: rng.integers(low, high + 1, count)


def poisson(rate: float, count: int, lengths: Lengths, seed: int = 0) -> Trace:
    """Return `count` independent arrivals, `rate` per second on average. Raises InputError."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / _positive("rate", rate), count)
    return Trace(gaps.cumsum(), lengths(rng, count))


def bursty(
    rate: float, count: int, lengths: Lengths, seed: int = 0, *, peak: float = 4.0, burst_s: float = 1.0
) -> Trace:
    """Return `count` arrivals of an on-off process: bursts, and silence between them.

    Bursts have `peak` times the mean rate, in requests per second, and last `burst_s` on average. Raises InputError.
    """
    rng = np.random.default_rng(seed)
    if not _positive("peak", peak) > 1:
        raise InputError(f"peak is more than 1 times the rate, not {peak!r}")
    active = rng.exponential(1 / (_positive("rate", rate) * peak), count).cumsum()  # the clock of the bursts alone
    ends = rng.exponential(_positive("burst_s", burst_s), 8 + int(2 * active[-1] / burst_s)).cumsum()
    while ends[-1] < active[-1]:
        ends = np.concatenate((ends, ends[-1] + rng.exponential(burst_s, len(ends)).cumsum()))
    silences = rng.exponential(burst_s * (peak - 1), len(ends)).cumsum()
    bursts = np.searchsorted(ends, active)
    return Trace(active + np.where(bursts > 0, silences[bursts - 1], 0.0), lengths(rng, count))


def read_trace(path: str | PathLike[str]) -> Trace:
    """Read a trace from a CSV file with the columns arrival_s and length, rows in any order.

    Raises InputError, which names the line that is wrong.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"arrival_s", "length"} <= set(rows.fieldnames or ()):
                raise InputError(f"{path}: the first line must name the columns arrival_s and length")
            pairs = [_row(path, rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a trace: {error}") from error
    if not pairs:
        raise InputError(f"{path} has no requests")
    times, lengths = zip(*sorted(pairs), strict=True)
    return Trace(np.array(times, float), np.array(lengths, np.int64))


def _row(path: object, line: int, row: dict[str, str]) -> tuple[float, int]:
    try:
        time, length = float(row["arrival_s"]), int(row["length"])
    except (TypeError, ValueError):
        time, length = math.nan, 0
    if not math.isfinite(time) or length < 1:
        raise InputError(f"{path}, line {line}: arrival_s is a number of seconds, length a whole number from 1")
    return time, length


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is a number above 0, not {value!r}")
    return value
