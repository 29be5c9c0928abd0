"""A discrete-event simulator of the engine: its triggers and policies, a cost model and a stream of arrivals.

What is simulated: one queue, any number of replicas that take batches from it, planned as the engine plans. What is
not: the interpreter, the response cache, cancellation. A batch occupies a replica for what the cost model says;
`overhead_s` is what a request spends outside, on its way into the queue and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

import numpy as np

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling import scheduler, triggers
from turbo_tvm.runtime.scheduling.arrivals import Trace
from turbo_tvm.runtime.scheduling.partition import Cost
from turbo_tvm.runtime.scheduling.request_queue import PLANNED
from turbo_tvm.runtime.scheduling.scheduler import Limits, Request
from turbo_tvm.runtime.scheduling.triggers import Trigger

SAID_EVERY = 50_000  # answered requests between two calls of `say`
WARM = 0.1  # of the requests: the first ones find an empty queue
BACKLOG = 0.05  # of the requests: fewer than these unanswered at the end are no sign of growth
GROWTH = 1.5  # later requests that wait less than so many times as long as earlier ones are none either


@dataclass(frozen=True)
class Simulated:
    """latency_s: float64 (requests,), from arrival to answer; batch_sizes: int64 (batches,), in order of their start.

    busy: the fraction of the replicas' time that batches took; seconds: from the first arrival to the last answer.
    """

    latency_s: np.ndarray
    batch_sizes: np.ndarray
    busy: float
    seconds: float

    @property
    def throughput(self) -> float:
        """Answers per second."""
        return len(self.latency_s) / self.seconds

    @property
    def mean_s(self) -> float:
        """Mean latency."""
        return float(self.latency_s.mean())

    def percentile_s(self, percent: float) -> float:
        """Latency that so many percent of the requests do not exceed."""
        return float(np.percentile(self.latency_s, percent))


def simulate(
    trace: Trace,
    cost: Cost,
    *,
    policy: str = "dp",
    trigger: str | Trigger = "hungry",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    replicas: int = 1,
    overhead_s: float = 0.0,
    jitter: Sequence[float] = (),
    timeout_s: float | None = None,
    seed: int = 0,
    say: Callable[[int], None] | None = None,
) -> Simulated:
    """Let the stream pass. timeout_s: gives every request a deadline, which orders it and drops none. jitter: factors,
    such as measured / predicted times of batches, one of which is drawn for every batch.

    say: is told now and then how many requests are answered. Raises InputError.
    """
    if replicas < 1:
        raise InputError(f"there is at least one replica, not {replicas!r}")
    choose = scheduler.policy(policy)
    when = triggers.trigger(trigger) if isinstance(trigger, str) else trigger
    factors = np.random.default_rng(seed).choice(jitter, len(trace)).tolist() if len(jitter) else []
    run = _Run(trace, cost, choose, when, limits, replicas, overhead_s, factors, timeout_s)
    run.to_the_end(say)
    seconds = run.now - float(trace.arrival_s[0])
    busy = run.busy_s / (replicas * seconds) if seconds > 0 else 1.0
    return Simulated(run.latency_s, np.array(run.batch_sizes), busy, seconds)


def is_bounded(trace: Trace, latency_s: np.ndarray) -> bool:
    """Whether the queue did not grow through the whole stream, as it does under more load than can be borne.

    It did not if few requests were unanswered when the last one came, or the last fifth waited about as long as those
    in the first half.
    """
    start, fifth = int(WARM * len(trace)), max(1, len(trace) // 5)
    left = (trace.arrival_s + latency_s > trace.arrival_s[-1]).mean()
    earlier = latency_s[start : start + 2 * fifth].mean()
    return bool(left <= BACKLOG or latency_s[-fifth:].mean() <= GROWTH * earlier)


class _Run:
    """The state between two events. now: seconds; waiting: in order of arrival."""

    def __init__(
        self,
        trace: Trace,
        cost: Cost,
        policy: scheduler.Policy,
        trigger: Trigger,
        limits: Limits,
        replicas: int,
        overhead_s: float,
        factors: list[float],
        timeout_s: float | None,
    ):
        self._cost, self._policy, self._trigger, self._limits = cost, policy, trigger, limits
        self._planned = max(PLANNED, limits.max_batch or 0)
        self._overhead_s, self._factors, self._timeout_s = overhead_s, factors, timeout_s
        self._arrivals: list[float] = trace.arrival_s.tolist()
        self._lengths: list[int] = trace.lengths.tolist()
        self._come = 0  # requests
        self._idle = replicas
        self._waiting: dict[int, Request] = {}
        self._ends: list[float] = []
        self.latency_s = np.zeros(len(trace))
        self.batch_sizes: list[int] = []
        self.busy_s, self.answered = 0.0, 0
        self.now = self._arrivals[0]

    def to_the_end(self, say: Callable[[int], None] | None) -> None:
        """Event by event: an arrival, the end of a batch, or a trigger's time."""
        said, look_again = 0, float("inf")
        while self.answered < len(self._arrivals) or self._ends:
            arrival = self._arrivals[self._come] if self._come < len(self._arrivals) else float("inf")
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
        i, self._come = self._come, self._come + 1
        due = None if self._timeout_s is None else self.now + self._timeout_s
        self._waiting[i] = Request(i, self._lengths[i], self.now, due)

    def _start_batches(self) -> float:
        """Give work to whoever is idle; returns when to look again if nothing happens."""
        while self._idle and self._waiting:
            limits = self._limits.at(self.now)
            requests = list(islice(self._waiting.values(), self._planned))
            more = self._come < len(self._arrivals)
            seconds = self._trigger(requests, self._cost, limits) if more else 0.0
            if seconds > 0:
                return self.now + seconds
            self._start(scheduler.next_batch(requests, self._policy, self._cost, limits))
        return float("inf")

    def _start(self, ids: Sequence[int]) -> None:
        seconds = self._cost([self._waiting.pop(i).length for i in ids])
        if self._factors:
            seconds *= self._factors[len(self.batch_sizes)]
        end = self.now + seconds
        heappush(self._ends, end)
        self._idle -= 1
        self.busy_s += seconds
        self.answered += len(ids)
        self.batch_sizes.append(len(ids))
        for i in ids:
            self.latency_s[i] = end - self._arrivals[i] + self._overhead_s
