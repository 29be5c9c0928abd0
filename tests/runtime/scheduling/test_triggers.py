"""Triggers: at once, or when a time is over, a batch is full, or an objective is near."""

from __future__ import annotations

import pytest

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
from turbo_tvm.runtime.scheduling.triggers import Lazy, hungry, trigger

TWO = [Request(0, 10, arrival_s=1.0), Request(1, 20, arrival_s=1.5)]


def cost(lengths):
    return 0.01 * sum(lengths)  # of both: 0.3 s


def test_hungry_never_waits():
    assert hungry(TWO, cost, BatchLimits(now_s=1.5)) == 0.0


def test_lazy_waits_until_the_oldest_has_waited_long_enough():
    lazy = Lazy(timeout_s=2.0)
    assert lazy(TWO, cost, BatchLimits(now_s=1.5)) == pytest.approx(1.5)
    assert lazy(TWO, cost, BatchLimits(now_s=3.0)) == 0.0
    assert lazy(TWO[::-1], cost, BatchLimits(now_s=2.0)) == pytest.approx(1.0)


def test_lazy_may_wait_for_ever():
    assert Lazy(timeout_s=float("inf"))(TWO, cost, BatchLimits(now_s=1.5)) == float("inf")


@pytest.mark.parametrize("full", [{"max_batch": 2}, {"max_tokens": 30}])
def test_lazy_does_not_wait_with_a_full_batch(full):
    assert Lazy(timeout_s=2.0)(TWO, cost, BatchLimits(now_s=1.5, **full)) == 0.0
    more = {name: value + 1 for name, value in full.items()}
    assert Lazy(timeout_s=2.0)(TWO, cost, BatchLimits(now_s=1.5, **more)) > 0


def test_lazy_starts_when_half_of_the_objective_is_used():
    lazy = Lazy(timeout_s=10.0, latency_s=2.0)
    assert lazy(TWO, cost, BatchLimits(now_s=1.5)) == pytest.approx(1.0 + 1.0 - 0.3 - 1.5)
    assert lazy(TWO, cost, BatchLimits(now_s=1.8)) == 0.0


def test_lazy_starts_in_time_for_a_deadline():
    due = [TWO[0], Request(1, 20, arrival_s=1.5, deadline_s=2.0)]
    assert Lazy(timeout_s=10.0)(due, cost, BatchLimits(now_s=1.5)) == pytest.approx(2.0 - 0.3 - 1.5)


@pytest.mark.parametrize("wrong", [{"timeout_s": -1}, {"latency_s": 0}, {"timeout_s": float("nan")}])
def test_times_make_sense(wrong):
    with pytest.raises(InputError, match="seconds"):
        Lazy(**wrong)


def test_triggers_have_names():
    assert trigger("hungry") is hungry and trigger("lazy") == Lazy()
    with pytest.raises(InputError, match="no trigger 'eager'; use one of hungry, lazy"):
        trigger("eager")
