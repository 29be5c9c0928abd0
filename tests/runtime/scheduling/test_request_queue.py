"""The queue: one computation per request, everyone answered once, whatever happens in whatever order."""

from __future__ import annotations

from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turbo_tvm.errors import DeadlineError, EngineError, OverloadError
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.scheduling import request_queue
from turbo_tvm.runtime.scheduling.request_queue import RequestQueue


def sequence(length: int) -> Batch:
    zeros = np.zeros(length, np.int32)
    return Batch(zeros, zeros, zeros, np.array([0, length], np.int32))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def all_of(requests, now):
    return [r.id for r in requests]


def first_of(requests, now):
    return [requests[0].id]


def at_once(requests, now):
    return 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock) -> RequestQueue:
    return RequestQueue(4, clock)


def test_a_request_is_taken_and_answered(queue, clock):
    future = queue.submit(b"a", sequence(3), None, 0)
    clock.now += 2
    (flight,), began = queue.take(at_once, all_of)
    assert (flight.request.length, flight.request.arrival_s, began) == (3, 100.0, 102.0)
    assert future.running() and not future.cancel() and len(queue) == 0
    clock.now += 1
    queue.finish(flight, np.ones(2))
    np.testing.assert_array_equal(future.result(0), [1, 1])
    found = queue.statistics()
    assert (found.submitted, found.answered, found.pending) == (1, 1, 0)
    assert (found.queue_s.total, found.latency_s.total) == (2.0, 3.0)


def test_identical_requests_share_a_computation(queue):
    futures = [queue.submit(b"a", sequence(3), None, 0) for _ in range(3)]
    (flight,), _ = queue.take(at_once, all_of)
    late = queue.submit(b"a", sequence(3), None, 0)  # it runs already
    queue.finish(flight, np.zeros(2))
    answers = [future.result(0) for future in (*futures, late)]
    answers[0][0] = 7  # everyone's own
    assert all(answer[0] == 0 for answer in answers[1:])
    assert (queue.statistics().answered, queue.statistics().shared) == (4, 3)
    queue.submit(b"a", sequence(3), None, 0)
    assert len(queue) == 1  # what is finished is not joined


def test_who_cancels_leaves_and_the_others_stay(queue):
    first, second = (queue.submit(b"a", sequence(3), None, 0) for _ in range(2))
    assert first.cancel() and len(queue) == 1
    assert second.cancel() and len(queue) == 0
    assert not second.claim()
    with pytest.raises(CancelledError):
        second.result(0)
    assert queue.statistics().cancelled == 2 and queue.statistics().pending == 0
    again = queue.submit(b"a", sequence(3), None, 0)
    queue.finish(queue.take(at_once, all_of)[0][0], np.zeros(1))
    assert again.done() and not again.cancel()


def test_a_deadline_that_passes_while_waiting(queue, clock):
    early, patient = queue.submit(b"a", sequence(3), 101.0, 0), queue.submit(b"b", sequence(3), None, 0)
    clock.now = 101.0
    flights, _ = queue.take(at_once, all_of)
    assert [f.key for f in flights] == [b"b"]
    with pytest.raises(DeadlineError, match="not started within 1 s"):
        early.result(0)
    queue.finish(flights[0], np.zeros(1))
    assert patient.done() and (queue.statistics().expired, queue.statistics().answered) == (1, 1)


def test_a_deadline_that_passes_while_running_is_late(queue, clock):
    future = queue.submit(b"a", sequence(3), 101.0, 0)
    flights, _ = queue.take(at_once, all_of)
    clock.now = 102.0
    future.expire()
    queue.finish(flights[0], np.zeros(1))
    assert future.result(0) is not None and queue.statistics().late == 1


def test_a_shared_request_is_as_urgent_as_the_most_urgent_who_waits(queue, clock):
    queue.submit(b"a", sequence(3), 150.0, 0)
    hasty = queue.submit(b"a", sequence(3), 120.0, 5)
    seen = []
    queue.submit(b"b", sequence(1), None, 0)
    hasty.cancel()
    flights, _ = queue.take(at_once, lambda requests, now: seen.extend(requests) or all_of(requests, now))
    assert [(r.deadline_s, r.priority) for r in seen] == [(150.0, 5), (None, 0)]
    assert len(flights) == 2


def test_a_full_queue_refuses(queue):
    waiting = [queue.submit(bytes([i]), sequence(1), None, 0) for i in range(4)]
    with pytest.raises(OverloadError, match=r"4 requests wait already.*raise max_queue"):
        queue.submit(b"x", sequence(1), None, 0)
    queue.submit(bytes([0]), sequence(1), None, 0)  # joining takes no room
    waiting[3].cancel()
    queue.submit(b"x", sequence(1), None, 0)
    assert (queue.statistics().rejected, queue.statistics().submitted) == (1, 6)


def test_closing_with_and_without_what_waits(clock):
    for drain in (True, False):
        queue = RequestQueue(4, clock)
        running, waiting = (queue.submit(k, sequence(1), None, 0) for k in (b"a", b"b"))
        (flight,), _ = queue.take(at_once, first_of)
        queue.close("it is closed", drain=drain)
        with pytest.raises(EngineError, match="it is closed"):
            queue.submit(b"c", sequence(1), None, 0)
        queue.finish(flight, np.zeros(1))
        assert running.result(0) is not None
        left, _ = queue.take(at_once, all_of)
        assert len(left) == (1 if drain else 0)
        if drain:
            queue.finish(left[0], np.zeros(1))
            assert waiting.result(0) is not None and queue.take(at_once, all_of)[0] == []
        else:
            with pytest.raises(EngineError, match="not answered: it is closed"):
                waiting.result(0)
        assert queue.statistics().pending == 0


def test_a_closed_queue_does_not_wait_for_more(queue):
    queue.submit(b"a", sequence(1), None, 0)
    queue.close("closed", drain=True)
    assert len(queue.take(lambda requests, now: 1e9, all_of)[0]) == 1


def test_only_some_are_planned_the_oldest_and_the_most_important_ones(clock):
    queue = RequestQueue(100, clock, planned=4)
    for i in range(8):
        clock.now += 1
        queue.submit(bytes([i]), sequence(i + 1), None, 0)
    seen = []

    def noted(requests, now):
        seen.append([r.length for r in requests])
        return first_of(requests, now)

    queue.take(at_once, noted)
    queue.submit(b"x", sequence(50), None, 1)
    queue.submit(b"y", sequence(60), 500.0, 0)
    queue.submit(b"z", sequence(70), None, 0)
    queue.take(at_once, noted)
    assert seen == [[1, 2, 3, 4], [2, 3, 50, 60]]


def test_who_shares_takes_no_place_but_is_not_without_number(queue):
    for _ in range(4 * request_queue.SHARERS):
        last = queue.submit(b"a", sequence(1), None, 0)
    with pytest.raises(OverloadError):
        queue.submit(b"a", sequence(1), None, 0)
    last.cancel()
    queue.submit(b"a", sequence(1), None, 0)
    queue.submit(b"b", sequence(1), None, 0)
    assert len(queue) == 2


def test_whose_time_is_over_makes_room(queue, clock):
    old = [queue.submit(bytes([i]), sequence(1), 101.0, 0) for i in range(4)]
    clock.now = 102.0
    queue.submit(b"x", sequence(1), None, 0)
    assert all(isinstance(f.exception(0), DeadlineError) for f in old) and len(queue) == 1


def test_cancelling_twice_counts_once(queue):
    future = queue.submit(b"a", sequence(1), None, 0)
    assert future.cancel() and future.cancel()
    assert (queue.statistics().cancelled, queue.statistics().pending) == (1, 0)


def test_a_callback_that_stops_its_thread_does_not_rob_the_others(queue):
    futures = [queue.submit(b"a", sequence(1), None, 0) for _ in range(3)]

    def stop(_):
        raise SystemExit

    futures[0].add_done_callback(stop)
    (flight,), _ = queue.take(at_once, all_of)
    with pytest.raises(SystemExit):
        queue.finish(flight, np.zeros(1))
    assert all(future.result(0) is not None for future in futures)


def test_an_answer_that_cannot_be_copied_is_an_error_for_each(queue):
    class Odd:
        def __array__(self, *_, **__):
            raise MemoryError("no room")

    futures = [queue.submit(b"a", sequence(1), None, 0) for _ in range(2)]
    (flight,), _ = queue.take(at_once, all_of)
    queue.finish(flight, Odd())
    for future in futures:
        with pytest.raises(MemoryError, match="no room"):
            future.result(0)


class Anything(RuleBasedStateMachine):
    """Everyone in any order: each future is settled once, with the right outcome, and the counts add up."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.queue = RequestQueue(5, self.clock)
        self.futures: list = []
        self.settled: list[int] = []
        self.flying: list = []
        self.rejected = 0
        self.closed = False

    @rule(key=st.integers(0, 6), timeout=st.none() | st.integers(1, 5), priority=st.integers(0, 2))
    def submit(self, key, timeout, priority):
        deadline = None if timeout is None else self.clock.now + timeout
        try:
            future = self.queue.submit(bytes([key]), sequence(key + 1), deadline, priority)
        except OverloadError:
            assert len(self.queue) == 5 or sum(not f.done() for f in self.futures) >= 5 * request_queue.SHARERS
            self.rejected += 1
        except EngineError:
            assert self.closed
        else:
            number = len(self.futures)
            self.futures.append(future)
            self.settled.append(0)
            future.add_done_callback(lambda _: self.settled.__setitem__(number, self.settled[number] + 1))

    @precondition(lambda self: self.futures)
    @rule(data=st.data())
    def cancel(self, data):
        future = data.draw(st.sampled_from(self.futures))
        running = future.running()
        assert not (future.cancel() and running)

    @precondition(lambda self: self.futures)
    @rule(data=st.data())
    def expire(self, data):
        data.draw(st.sampled_from(self.futures)).expire()

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds):
        self.clock.now += seconds

    @precondition(lambda self: len(self.queue))
    @rule(count=st.integers(1, 3))
    def take(self, count):
        waiting = [f for f in self.futures if not (f.done() or f.running())]
        if not self.closed and all(f.deadline_s is not None and f.deadline_s <= self.clock.now for f in waiting):
            return  # all of them expire, and it would wait for more
        flights, _ = self.queue.take(at_once, lambda requests, now: [r.id for r in requests[:count]])
        assert self.closed or flights
        assert all(w.running() for f in flights for w in f.waiters)
        self.flying += flights

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data, fails):
        flight = data.draw(st.sampled_from(self.flying))
        self.flying.remove(flight)
        waiters = list(flight.waiters)
        self.queue.finish(flight, np.array([flight.request.length]), ValueError("bad") if fails else None)
        for waiter in waiters:
            assert (
                isinstance(waiter.exception(0), ValueError) if fails else waiter.result(0)[0] == flight.request.length
            )

    @rule(drain=st.booleans())
    def close(self, drain):
        if len(self.futures) > 8:
            self.closed = True
            self.queue.close("closed", drain=drain)

    @invariant()
    def settled_once(self):
        assert all(times <= 1 for times in self.settled)
        assert [f.done() for f in self.futures] == [times == 1 for times in self.settled]

    @invariant()
    def counts_add_up(self):
        found = self.queue.statistics()
        assert (found.submitted, found.rejected) == (len(self.futures), self.rejected)
        assert found.pending == sum(not f.done() for f in self.futures)
        assert found.cancelled == sum(f.cancelled() for f in self.futures)
        kept = [f for f in self.futures if f.done() and not f.cancelled()]
        assert found.answered == sum(f.exception(0) is None for f in kept)
        assert found.expired == sum(isinstance(f.exception(0), DeadlineError) for f in kept)

    def teardown(self):
        for flight in self.flying:
            self.queue.finish(flight, np.array([flight.request.length]))
        self.queue.close("the end", drain=False)
        assert all(times == 1 for times in self.settled)


Anything.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnything = Anything.TestCase
