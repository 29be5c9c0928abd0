"""The engine's queue of flights that wait to run. Thread-safe.

A flight is one computation with everyone who waits for it: identical requests share one. Producers `submit`; an
executor `take`s the flights of its next batch and `finish`es each of them. Every future that `submit` returned is
settled exactly once: by `finish`, by its own cancellation, by its deadline, or when the queue is closed or stopped.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import nsmallest
from typing import Any

from turbo_tvm.errors import EngineError, OverloadError
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.scheduling.batch_limits import Request
from turbo_tvm.runtime.scheduling.engine_statistics import EngineStatistics, Recorder
from turbo_tvm.runtime.scheduling.flight import Flight, RequestFuture

PLANNED = 256  # requests that are planned at a time, by priority and age: a plan takes less than a millisecond
SHARERS = 8  # unsettled requests per place in the queue: those that join a flight take no place, and need a limit too
LOOK_AGAIN_S = 3600.0  # the longest that an executor waits for a trigger before it asks again

Clock = Callable[[], float]
WaitS = Callable[[Sequence[Request], float], float]
Choose = Callable[[Sequence[Request], float], list[int]]


class RequestQueue:
    """A queue of at most `max_queue` flights that wait.

    clock: returns seconds. planned: how many requests the policy sees at a time.
    """

    def __init__(self, max_queue: int, clock: Clock = time.perf_counter, *, planned: int = PLANNED):
        self.max_queue, self.planned = max_queue, planned
        self._clock = clock
        self._lock = threading.Condition()
        self._turn = threading.Lock()  # one executor at a time waits and plans
        self._waiting: dict[int, Flight] = {}
        self._by_key: dict[bytes, Flight] = {}
        self._numbers = itertools.count()
        self._first_deadline = float("inf")
        self._urgent = False  # whether any request ever had a priority or a deadline
        self._unsettled = 0
        self._closed: str | None = None
        self.recorder = Recorder()

    def __len__(self) -> int:
        return len(self._waiting)

    def statistics(self) -> EngineStatistics:
        """Return the counts and histograms so far."""
        with self._lock:
            return self.recorder.snapshot()

    def submit(
        self, key: bytes, sequence: Batch, deadline_s: float | None, priority: int, output: str | None = None
    ) -> RequestFuture:
        """Queue one sequence, or join the flight of an identical one; return the future of its answer.

        key: names the sequence and the output.
        deadline_s: on the queue's clock; None for no deadline.
        output: the one that is asked for; None for all of them.

        Raises OverloadError if the queue is full, EngineError if it is closed.
        """
        future = self._future(deadline_s)
        if len(self._waiting) >= self.max_queue:
            self._expire()  # perhaps there is room
        with self._lock:
            self._check_open()
            flight = self._by_key.get(key)
            if flight is None:
                self._check_room()
                length = len(sequence.token_ids)
                request = Request(next(self._numbers), length, future.submitted_s, deadline_s, priority)
                flight = self._by_key[key] = self._waiting[request.id] = Flight(request, key, sequence, output)
                flight.waiters.append(future)
                self._lock.notify()
            else:
                self._join(flight, future, priority)
            future.flight = flight
            self.recorder.count("submitted")
            self._unsettled += 1
            self._urgent = self._urgent or priority != 0 or deadline_s is not None
            if deadline_s is not None:
                self._first_deadline = min(self._first_deadline, deadline_s)
        return future

    def answered(self, answer: Any) -> RequestFuture:
        """Return a settled future for a request that the cache answers. Raises EngineError if the queue is closed."""
        future = self._future(None)
        with self._lock:
            self._check_open()
            for name in ("submitted", "answered", "cache_hits"):
                self.recorder.count(name)
            self.recorder.add("latency_s", self._clock() - future.submitted_s)
        future.set_result(answer)
        return future

    def take(self, wait_s: WaitS, choose: Choose) -> tuple[list[Flight], float]:
        """Wait for the flights to run next; return them, and when choosing them began, in seconds.

        wait_s(requests, now_s): the seconds to wait for more. choose(requests, now_s): the ids of those to run.

        Returns no flights when the queue is closed and empty.
        """
        with self._turn:
            while True:
                requests = self._requests(wait_s)
                began = self._clock()
                flights = self._claim(choose(requests, began)) if requests else []  # producers may submit meanwhile
                if flights or not requests:
                    return flights, began

    def finish(self, flight: Flight, answer: Any = None, error: BaseException | None = None) -> None:
        """Settle every waiter of a flight with a copy of the answer, or with the error."""
        with self._lock:
            if self._by_key.get(flight.key) is flight:
                del self._by_key[flight.key]
            waiters, flight.waiters = flight.waiters, []
            self._unsettled -= len(waiters)
            self._record(waiters, failed=error is not None)
        raised: list[BaseException] = []
        for waiter in waiters:
            try:
                waiter.settle(answer, error)
            except BaseException as stop:  # a callback's, such as SystemExit: the others are settled before it goes on
                raised.append(stop)
        if raised:
            raise raised[0]

    def count(self, name: str, by: int = 1) -> None:
        """Increase one of the executor's counts."""
        with self._lock:
            self.recorder.count(name, by)

    def record_batch(self, lengths: Sequence[int], rows: int, seconds: float) -> None:
        """Count a batch of these lengths that computed this many token rows in this many seconds."""
        with self._lock:
            self.recorder.count("batches")
            self.recorder.count("rows", rows)
            self.recorder.count("padding_rows", rows - sum(lengths))
            for name, value in (("execution_s", seconds), ("batch_size", len(lengths)), ("batch_tokens", sum(lengths))):
                self.recorder.add(name, value)

    def close(self, reason: str, *, drain: bool) -> None:
        """Accept no more requests; those that wait are still answered, or without `drain` get an EngineError.

        reason: the message of that error, and of those that later requests get.
        """
        with self._lock:
            self._closed = self._closed or reason
            left = [] if drain else list(self._waiting.values())
            if not drain:
                self._waiting.clear()
            self._lock.notify_all()
        for flight in left:
            self._claim_waiters(flight)
            self.finish(flight, error=EngineError(f"the request was not answered: {self._closed}"))

    def _record(self, waiters: Sequence[RequestFuture], failed: bool) -> None:
        count, now = self.recorder.count, self._clock()
        count("failed" if failed else "answered", len(waiters))
        for waiter in () if failed else waiters:
            count("shared", waiter.shared)
            count("late", waiter.deadline_s is not None and now > waiter.deadline_s)
            self.recorder.add("latency_s", now - waiter.submitted_s)

    def _future(self, deadline_s: float | None) -> RequestFuture:
        future = RequestFuture()
        future.leave = self._leave
        future.deadline_s, future.submitted_s = deadline_s, self._clock()
        return future

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineError(self._closed)

    def _check_room(self, joins: bool = False) -> None:
        full = self._unsettled >= SHARERS * self.max_queue if joins else len(self._waiting) >= self.max_queue
        if full:
            self.recorder.count("rejected")
            raise OverloadError(
                f"{len(self._waiting):,} requests wait already, as many as max_queue allows: send again later, send to "
                "another server, or raise max_queue"
            )

    def _join(self, flight: Flight, future: RequestFuture, priority: int) -> None:
        self._check_room(joins=True)
        future.shared = True
        if flight.running:
            future.set_running_or_notify_cancel()
        if priority > flight.request.priority:
            flight.request = replace(flight.request, priority=priority)
        flight.add(future)

    def _leave(self, future: RequestFuture, outcome: str) -> None:
        """Remove a future that was settled from outside, and its flight if nobody else waits for it."""
        with self._lock:
            if future.left:  # `Future.cancel` returns True each time
                return
            future.left = True
            self._unsettled -= 1
            self.recorder.count(outcome)
            flight = future.flight
            if flight is None or future not in flight.waiters:  # an executor took the flight just now, without it
                return
            flight.remove(future)
            if not flight.waiters:
                self._drop(flight)

    def _drop(self, flight: Flight) -> None:
        self._waiting.pop(flight.request.id, None)
        if self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]

    def _requests(self, wait_s: WaitS) -> list[Request]:
        """Wait until it is time to plan; return the requests to plan, none when the queue is closed and empty."""
        while True:
            self._expire()
            with self._lock:
                if not self._waiting:
                    if self._closed is not None:
                        return []
                    self._lock.wait()
                    continue
                requests = self._first()
                seconds = 0.0 if self._closed is not None else wait_s(requests, self._clock())
                if seconds <= 0:
                    return requests
                self._lock.wait(min(seconds, LOOK_AGAIN_S))

    def _first(self) -> list[Request]:
        """Return the requests to plan in order of arrival: the oldest, and the most urgent of the others."""
        requests = (flight.request for flight in self._waiting.values())
        if len(self._waiting) <= self.planned or not self._urgent:
            return list(itertools.islice(requests, self.planned))
        oldest = list(itertools.islice(requests, self.planned // 2))
        return oldest + sorted(nsmallest(self.planned - len(oldest), requests, key=_urgency), key=lambda r: r.id)

    def _expire(self) -> None:
        """Settle the futures whose deadline has passed."""
        now = self._clock()
        if now < self._first_deadline:
            return
        with self._lock:
            waiters = [w for flight in self._waiting.values() for w in flight.waiters]
            due = [(w, w.deadline_s) for w in waiters if w.deadline_s is not None]
            self._first_deadline = min((deadline for _, deadline in due if deadline > now), default=float("inf"))
        for waiter, deadline in due:
            if deadline <= now:
                waiter.expire()

    def _claim(self, ids: Sequence[int]) -> list[Flight]:
        """Take these flights to run, uncancellable from here on; return those that somebody still waits for."""
        self._expire()
        with self._lock:
            flights = [self._waiting.pop(i) for i in ids if i in self._waiting]
            for flight in flights:
                self._claim_waiters(flight)
                if not flight.waiters:
                    self._drop(flight)
            now = self._clock()
            for waiter in (w for flight in flights for w in flight.waiters):
                self.recorder.add("queue_s", now - waiter.submitted_s)
            return [flight for flight in flights if flight.waiters]

    def _claim_waiters(self, flight: Flight) -> None:
        with self._lock:
            flight.running = True
            flight.waiters = [w for w in flight.waiters if w.claim()]


def _urgency(request: Request) -> tuple[float, float, float]:
    due = float("inf") if request.deadline_s is None else request.deadline_s
    return -request.priority, due, request.arrival_s
