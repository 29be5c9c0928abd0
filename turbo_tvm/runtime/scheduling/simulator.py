"""A discrete-event simulator of the engine: its triggers and policies, a cost model and a stream of arrivals.

It simulates one queue and any number of replicas that take batches from it, planned as the engine plans. It does not
simulate the interpreter, the response cache or cancellation. A batch occupies a replica for as long as the cost model
says; `overhead_s` is what a request spends on its way into the queue and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from typing import NamedTuple

import numpy as np

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling import scheduler, triggers
from turbo_tvm.runtime.scheduling.arrivals import Trace
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
from turbo_tvm.runtime.scheduling.partition import Cost
from turbo_tvm.runtime.scheduling.request_queue import PLANNED
from turbo_tvm.runtime.scheduling.triggers import Trigger

SAID_EVERY = 50_000  # answered requests between two calls of `say`
WARM = 0.1  # the first part of the requests, which find an empty queue and do not count
BACKLOG = 0.05  # a smaller part of the requests unanswered at the end is no sign of growth
GROWTH = 1.5  # later requests that wait less than this many times as long as earlier ones are none either


@dataclass(frozen=True)
class Simulated:
    """The result of a simulation."""

    latency_s: np.ndarray  # float64 (requests,), from arrival to answer
    batch_sizes: np.ndarray  # int64 (batches,), in order of their start
    busy: float  # the fraction of the replicas' time that batches took
    seconds: float  # from the first arrival to the last answer

    @property
    def throughput(self) -> float:
        """Answers per second."""
        return len(self.latency_s) / self.seconds

    @property
    def mean_s(self) -> float:
        """Mean latency in seconds."""
        return float(self.latency_s.mean())

    def percentile_s(self, percent: float) -> float:
        """Return the latency in seconds that this percentage of the requests does not exceed."""
        return float(np.percentile(self.latency_s, percent))


def simulate(
    trace: Trace,
    cost: Cost,
    *,
    policy: str = "dp",
    trigger: str | Trigger = "hungry",
    limits: BatchLimits = BatchLimits(),  # noqa: B008 (frozen)
    replicas: int = 1,
    overhead_s: float = 0.0,
    jitter: Sequence[float] = (),
    timeout_s: float | None = None,
    seed: int = 0,
    say: Callable[[int], None] | None = None,
) -> Simulated:
    """Simulate an engine that serves a stream of requests.

    policy, trigger, limits: as the engine's.
    replicas: models that take batches from the queue.
    overhead_s: added to every request's latency.
    jitter: factors, such as measured / predicted times of batches, one of which is drawn for every batch.
    timeout_s: gives every request a deadline, which orders it; none is dropped.
    say: called every `SAID_EVERY` answers with how many requests are answered.

    Raises InputError.
    """
    if replicas < 1:
        raise InputError(f"there is at least one replica, not {replicas!r}")
    choose = scheduler.policy(policy)
    when = triggers.trigger(trigger) if isinstance(trigger, str) else trigger
    factors = np.random.default_rng(seed).choice(jitter, len(trace)).tolist() if len(jitter) else []
    run = _Run(trace, _Setup(cost, choose, when, limits, replicas, overhead_s, factors, timeout_s))
    run.to_the_end(say)
    seconds = run.now - float(trace.arrival_s[0])
    busy = run.busy_s / (replicas * seconds) if seconds > 0 else 1.0
    return Simulated(run.latency_s, np.array(run.batch_sizes), busy, seconds)


def is_bounded(trace: Trace, latency_s: np.ndarray) -> bool:
    """Return whether the queue stayed bounded, which it does not under more load than the engine can bear.

    It did if few requests were unanswered when the last one came, or if the last fifth waited about as long as those in
    the first half.
    """
    start, fifth = int(WARM * len(trace)), max(1, len(trace) // 5)
    left = (trace.arrival_s + latency_s > trace.arrival_s[-1]).mean()
    earlier = latency_s[start : start + 2 * fifth].mean()
    return bool(left <= BACKLOG or latency_s[-fifth:].mean() <= GROWTH * earlier)


class _Setup(NamedTuple):
    """The arguments of `simulate` that stay the same during a run."""

    cost: Cost
    policy: scheduler.Policy
    trigger: Trigger
    limits: BatchLimits
    replicas: int
    overhead_s: float
    factors: list[float]  # of the cost of each batch; empty for none
    timeout_s: float | None


class _Run:
    """The state of a simulation between two events; `now` is in seconds."""

    def __init__(self, trace: Trace, setup: _Setup):
        self._setup = setup
        self._planned = max(PLANNED, setup.limits.max_batch or 0)
        self._arrivals: list[float] = trace.arrival_s.tolist()
        self._lengths: list[int] = trace.lengths.tolist()
        self._arrived = 0  # requests
        self._idle = setup.replicas
        self._waiting: dict[int, Request] = {}  # in order of arrival
        self._ends: list[float] = []  # of the batches that run, a heap
        self.latency_s = np.zeros(len(trace))
        self.batch_sizes: list[int] = []
        self.busy_s, self.answered = 0.0, 0
        self.now = self._arrivals[0]

    def to_the_end(self, say: Callable[[int], None] | None) -> None:
        """Go on from event to event: an arrival, the end of a batch, or a trigger's time."""
        said, look_again = 0, float("inf")
        while self.answered < len(self._arrivals) or self._ends:
            arrival = self._arrivals[self._arrived] if self._arrived < len(self._arrivals) else float("inf")
            end = self._ends[0] if self._ends else float("inf")
            self.now = min(arrival, end, look_again)
            if end <= self.now:
                heappop(self._ends)
                self._idle += 1
            elif arrival <= self.now:
                self._arrive()
            look_again = self._start_batches()
            if say is not None and self.answered >= said + SAID_EVERY:
                said = self.answered
                say(said)

    def _arrive(self) -> None:
        i, self._arrived = self._arrived, self._arrived + 1
        due = None if self._setup.timeout_s is None else self.now + self._setup.timeout_s
        self._waiting[i] = Request(i, self._lengths[i], self.now, due)

    def _start_batches(self) -> float:
        """Give work to idle replicas; return when to look again if nothing happens."""
        setup = self._setup
        while self._idle and self._waiting:
            limits = setup.limits.at(self.now)
            requests = list(islice(self._waiting.values(), self._planned))
            more = self._arrived < len(self._arrivals)
            seconds = setup.trigger(requests, setup.cost, limits) if more else 0.0
            if seconds > 0:
                return self.now + seconds
            self._start(scheduler.next_batch(requests, setup.policy, setup.cost, limits))
        return float("inf")

    def _start(self, ids: Sequence[int]) -> None:
        seconds = self._setup.cost([self._waiting.pop(i).length for i in ids])
        if self._setup.factors:
            seconds *= self._setup.factors[len(self.batch_sizes)]
        end = self.now + seconds
        heappush(self._ends, end)
        self._idle -= 1
        self.busy_s += seconds
        self.answered += len(ids)
        self.batch_sizes.append(len(ids))
        for i in ids:
            self.latency_s[i] = end - self._arrivals[i] + self._setup.overhead_s
