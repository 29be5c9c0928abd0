"""Flights and futures: claimed once, settled with a copy, and a flight as urgent as its waiters."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.errors import DeadlineError
from turbo_tvm.runtime.scheduling import flight
from turbo_tvm.runtime.scheduling.batch_limits import Request
from turbo_tvm.runtime.scheduling.flight import Flight, RequestFuture


@pytest.fixture
def future() -> RequestFuture:
    made = RequestFuture()
    made.outcomes = []
    made.leave = lambda _, outcome: made.outcomes.append(outcome)
    return made


def test_is_claimed_once_and_then_neither_cancelled_nor_expired(future):
    assert future.claim() and not future.claim()
    assert not future.cancel()
    future.expire()
    assert not future.done() and future.outcomes == []


def test_a_cancelled_one_is_not_claimed(future):
    assert future.cancel() and not future.claim()
    assert future.outcomes == ["cancelled"]


def test_an_expired_one_says_how_long_it_waited(future):
    future.submitted_s, future.deadline_s = 5.0, 7.5
    future.expire()
    with pytest.raises(DeadlineError, match=r"not started within 2\.5 s"):
        future.result(0)
    assert future.outcomes == ["expired"]


def test_the_answer_is_the_waiters_own(future):
    answer = np.ones(2)
    future.claim()
    future.settle(answer, None)
    answer[0] = 9
    assert future.result(0).tolist() == [1, 1]


def test_without_memory_for_a_copy_it_gets_that_error(future, monkeypatch):
    def none_left(answer):
        raise MemoryError

    monkeypatch.setattr(flight, "own_copy", none_left)
    future.claim()
    future.settle(np.ones(2), None)
    assert isinstance(future.exception(0), MemoryError)


def test_a_flight_has_the_earliest_deadline_of_those_who_wait():
    one = Flight(Request(0, 3), b"", None)
    waiters = []
    for deadline, earliest in ((6.0, 6.0), (None, 6.0), (4.0, 4.0), (5.0, 4.0)):
        waiters.append(RequestFuture())
        waiters[-1].deadline_s = deadline
        one.add(waiters[-1])
        assert one.request.deadline_s == earliest
    for number, earliest in ((3, 4.0), (2, 6.0), (1, 6.0), (0, None)):
        one.remove(waiters[number])
        assert one.request.deadline_s == earliest
