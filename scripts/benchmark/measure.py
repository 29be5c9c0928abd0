"""Timing: a first measurement that rules out the hopeless, then rounds in rotating order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from .strategies import PADDED, RAGGED_INPUT

PAUSE_S = 0.02  # worker threads of the last contender go to sleep
WARM_BELOW_S = 0.5  # a longer call warms itself
FIRST_AGAIN_BELOW_S = 2.0  # the first call also grows buffers
SHORT_S, SAMPLE_S = 0.005, 0.010  # calls below the first are repeated until a sample lasts the second
SLOWER_STRATEGY, SLOWER_RIVAL, CLOSE = 2.0, 2.5, 1.25

T = TypeVar("T")


class Clock(Protocol):
    def perf_counter(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class Limits:
    """At most `rounds`; at least `min_rounds`, and between them no new round after `seconds`."""

    rounds: int = 7
    min_rounds: int = 3
    seconds: float = 40.0


@dataclass
class Entry:
    """A contender with a strategy on one workload; times in seconds, samples in round order."""

    contender: str
    strategy: str
    call: Callable[[], object] = field(repr=False)
    compilations: Callable[[], int] = field(default=lambda: 0, repr=False)
    first_s: float = math.inf
    calls_per_sample: int = 1
    samples_s: list[float] = field(default_factory=list)
    not_repeated: str | None = None
    failed: str | None = None

    def record(self) -> dict[str, Any]:
        """What the JSON keeps."""
        kept: dict[str, Any] = {"contender": self.contender, "strategy": self.strategy}
        if self.failed:
            return kept | {"failed": self.failed}
        kept |= {"first_s": self.first_s, "calls_per_sample": self.calls_per_sample, "samples_s": self.samples_s}
        return kept | ({"not_repeated": self.not_repeated} if self.not_repeated else {})


def measure(entries: list[Entry], limits: Limits, reason: Callable[[BaseException], str], clock: Clock = time) -> int:
    """Fill in the samples; returns the number of rounds."""
    start = clock.perf_counter()
    for entry in entries:
        try:
            _first(entry, clock)
        except Exception as error:  # out of memory, for one: the others go on, and the report says so
            entry.failed = reason(error)
    rule_out([e for e in entries if not e.failed])
    kept = [e for e in entries if not (e.failed or e.not_repeated)]
    number = 0
    while more_rounds(number, clock.perf_counter() - start, limits):
        for entry in rotated(kept, number):
            entry.samples_s.append(_sample(entry, clock))
        number += 1
    return number


def more_rounds(done: int, elapsed_s: float, limits: Limits) -> bool:
    return done < limits.rounds and (done < limits.min_rounds or elapsed_s < limits.seconds)


def rotated(items: list[T], number: int) -> list[T]:
    """The order of a round: after as many rounds as items, each has had every place once."""
    shift = number % len(items) if items else 0
    return items[shift:] + items[:shift]


def rule_out(entries: list[Entry]) -> None:
    """Mark rivals' entries that their first measurement shows to be far from the best; padding at its best stays."""
    rivals = [e for e in entries if e.strategy != RAGGED_INPUT]
    if not rivals:
        return
    fastest = min(rivals, key=lambda e: e.first_s)
    padded = min((e.first_s for e in rivals if e.strategy == PADDED), default=math.inf)
    for entry in rivals:
        if entry.strategy == PADDED and entry.first_s <= CLOSE * padded:
            continue
        own = min((e for e in rivals if e.contender == entry.contender), key=lambda e: e.first_s)
        if entry.first_s > SLOWER_STRATEGY * own.first_s:
            entry.not_repeated = f"one sample, {entry.first_s / own.first_s:.1f}x slower than {own.strategy}"
        elif entry.first_s > SLOWER_RIVAL * fastest.first_s:
            ratio = entry.first_s / fastest.first_s
            entry.not_repeated = f"one sample, {ratio:.1f}x slower than {fastest.contender} ({fastest.strategy})"


def _first(entry: Entry, clock: Clock) -> None:
    """One sample of an entry that has not run yet; calls that compile do not count."""
    clock.sleep(PAUSE_S)
    while True:
        before = entry.compilations()
        entry.first_s = _time(entry, 1, clock)
        if entry.compilations() == before:
            break
    if entry.first_s < FIRST_AGAIN_BELOW_S:
        entry.first_s = _time(entry, 1, clock)
    if entry.first_s < SHORT_S:
        entry.calls_per_sample = math.ceil(SAMPLE_S / entry.first_s)
        entry.first_s = _time(entry, entry.calls_per_sample, clock)


def _sample(entry: Entry, clock: Clock) -> float:
    clock.sleep(PAUSE_S)
    if entry.first_s < WARM_BELOW_S:
        entry.call()
    return _time(entry, entry.calls_per_sample, clock)


def _time(entry: Entry, calls: int, clock: Clock) -> float:
    start = clock.perf_counter()
    for _ in range(calls):
        entry.call()
    return (clock.perf_counter() - start) / calls
