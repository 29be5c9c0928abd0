"""The simulator: by hand, against queueing theory, against the engine itself, and the published shape."""

from __future__ import annotations

import time

import numpy as np
import pytest

from turbo_tvm import Engine
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling.arrivals import Trace, poisson, uniform
from turbo_tvm.runtime.scheduling.scheduler import POLICIES, Limits
from turbo_tvm.runtime.scheduling.simulator import is_bounded, simulate
from turbo_tvm.runtime.scheduling.triggers import Lazy


class Constant:
    """Every batch takes a second."""

    def __call__(self, lengths):
        return 1.0

    def batches(self, counts, tokens, squares, longest):
        return np.ones(np.shape(counts))


class PaddedGpu:
    """Padded execution on a device that a short sequence does not fill: what batches gain, and what padding loses."""

    def __call__(self, lengths):
        return float(self.batches(len(lengths), None, None, max(lengths)))

    def batches(self, counts, tokens, squares, longest):
        return 2e-3 + 1.2e-5 * np.maximum(counts * longest, 150) + 6e-9 * counts * longest**2


def trace_of(times, lengths=None) -> Trace:
    return Trace(np.array(times, float), np.array(lengths or [1] * len(times), np.int64))


def test_one_after_the_other_by_hand():
    found = simulate(trace_of([0.0, 0.5, 3.0]), Constant(), policy="nobatch", overhead_s=0.1)
    np.testing.assert_allclose(found.latency_s, [1.1, 1.6, 1.1])
    assert found.batch_sizes.tolist() == [1, 1, 1]
    assert (found.seconds, found.busy, found.throughput) == (4.0, 0.75, 0.75)
    assert found.mean_s == pytest.approx(3.8 / 3) and found.percentile_s(100) == pytest.approx(1.6)


def test_what_waits_runs_together_by_hand():
    found = simulate(trace_of([0.0, 0.5, 0.9, 3.0]), Constant(), policy="dp")
    np.testing.assert_allclose(found.latency_s, [1.0, 1.5, 1.1, 1.0])
    assert found.batch_sizes.tolist() == [1, 2, 1]


def test_replicas_share_the_queue_by_hand():
    found = simulate(trace_of([0.0, 0.1, 0.2]), Constant(), policy="nobatch", replicas=2)
    np.testing.assert_allclose(found.latency_s, [1.0, 1.0, 1.8])


def test_lazy_waits_for_more_by_hand():
    found = simulate(trace_of([0.0, 0.3, 5.0]), Constant(), policy="dp", trigger=Lazy(timeout_s=0.5))
    np.testing.assert_allclose(found.latency_s, [1.5, 1.2, 1.0])  # nobody waits for more at the end of the stream


def test_jitter_by_hand():
    found = simulate(trace_of([0.0, 5.0]), Constant(), jitter=[2.0])
    np.testing.assert_allclose(found.latency_s, [2.0, 2.0])


def test_caps_bind():
    found = simulate(poisson(20.0, 500, uniform(1, 9)), Constant(), policy="naive", limits=Limits(max_batch=7))
    assert found.batch_sizes.max() == 7


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_for_a_single_server_is_as_pollaczek_and_khinchine_say(load):
    found = simulate(poisson(load, 200_000, uniform(1, 1), seed=2), Constant(), policy="nobatch")
    assert found.mean_s == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)
    assert found.busy == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("trigger", ["hungry", "lazy"])
def test_everyone_is_answered_under_every_policy(policy, trigger):
    trace = poisson(900.0, 1500, uniform(2, 100), seed=4)
    limits = Limits(max_batch=16, max_tokens=1000, max_wait_s=0.2)
    found = simulate(trace, PaddedGpu(), policy=policy, trigger=trigger, limits=limits, replicas=3, timeout_s=0.05)
    assert (found.latency_s > 0).all() and found.batch_sizes.sum() == len(trace)
    assert found.latency_s.max() < 10


def test_the_published_shape():
    """Fang et al., 2021: lengths 2..100: nobatch < naive < dp; lengths 5..500: naive loses to nobatch."""
    capacity = {}
    for low, high in ((2, 100), (5, 500)):
        trace = poisson(1e5, 3000, uniform(low, high), seed=1)  # all at once: what can be borne
        for policy in ("nobatch", "naive", "dp"):
            found = simulate(trace, PaddedGpu(), policy=policy, limits=Limits(max_batch=20))
            capacity[high, policy] = found.throughput
    assert capacity[100, "nobatch"] < capacity[100, "naive"] < capacity[100, "dp"]
    assert capacity[500, "naive"] < capacity[500, "nobatch"] <= capacity[500, "dp"]


def test_deadlines_reach_the_policy():
    trace = poisson(250.0, 4000, uniform(2, 500), seed=3)
    in_time = {}
    for policy in ("nobatch", "deadline"):
        found = simulate(trace, PaddedGpu(), policy=policy, limits=Limits(max_batch=8), timeout_s=0.1)
        in_time[policy] = (found.latency_s < 0.1).sum()
    assert in_time["deadline"] > in_time["nobatch"]


def test_a_load_that_can_be_borne_and_one_that_cannot():
    for load, bounded in ((0.5, True), (0.8, True), (1.2, False)):
        for seed in range(5):
            trace = poisson(load, 2000, uniform(1, 1), seed)
            assert is_bounded(trace, simulate(trace, Constant(), policy="nobatch").latency_s) == bounded


def test_many_requests_over_many_replicas_take_seconds():
    """The time is measured by `scripts/bench scheduler`; here: progress, and that nothing grows with the stream."""
    said: list[int] = []
    trace = poisson(64 * 0.8 / 2.5e-3, 120_000, uniform(2, 100), seed=1)
    found = simulate(trace, PaddedGpu(), policy="dp", replicas=64, say=said.append)
    assert said == sorted(said) and said[-1] >= 100_000
    assert found.busy < 1 and is_bounded(trace, found.latency_s)


@pytest.mark.parametrize("policy", ["nobatch", "dp"])
def test_the_engine_does_what_the_simulator_says(fakes, policy):
    """Latency and batches of an engine whose model takes what its cost says. What runs beside it may spoil one try."""
    for _ in range(4):
        measured, batch, found = engine_beside_simulator(fakes(), policy)
        alike = measured == pytest.approx(found.percentile_s(50), rel=0.25)
        if alike and batch == pytest.approx(found.batch_sizes.mean(), rel=0.25):
            return
    raise AssertionError((measured, found.percentile_s(50), batch, found.batch_sizes.mean()))


class Sleeps:
    """What a model costs that sleeps."""

    def __call__(self, lengths):
        return 4e-3 + 1e-4 * len(lengths)

    def batches(self, counts, tokens, squares, longest):
        return 4e-3 + 1e-4 * counts


def engine_beside_simulator(fake, policy):
    """The median latency and mean batch of the engine, and the simulator's result."""
    cost, answer = Sleeps(), fake.answer

    def slow(parts, output=None):
        time.sleep(cost(parts))
        return answer(parts, output)

    fake.answer = slow
    trace = poisson(150.0, 200, uniform(2, 100), seed=1)
    ends = np.zeros(len(trace))
    with Engine(fake, policy=policy, cost=cost, cache=0, progress=False) as serving:
        start = time.perf_counter() + 0.05
        futures = []
        for i, due in enumerate((trace.arrival_s + start).tolist()):
            time.sleep(max(0.0, due - time.perf_counter()))
            futures.append(serving.submit([i % 1000, 1]))
            futures[-1].add_done_callback(lambda _, i=i: ends.__setitem__(i, time.perf_counter()))
        for future in futures:
            future.result(30)
    found = simulate(trace, serving.cost, policy=policy, limits=serving.limits, overhead_s=2e-4)
    return float(np.median(ends - start - trace.arrival_s)), serving.statistics.batch_size.mean, found


def test_no_replicas():
    with pytest.raises(InputError, match="at least one replica"):
        simulate(trace_of([0.0]), Constant(), replicas=0)
