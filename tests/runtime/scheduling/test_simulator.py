"""The simulator: by hand, against queueing theory, against the engine's own batches, and the published shape."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from turbo_tvm import Engine
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling.arrivals import Trace, poisson, uniform
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits
from turbo_tvm.runtime.scheduling.cost_model import RefinedCost
from turbo_tvm.runtime.scheduling.scheduler import POLICIES
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
    found = simulate(poisson(20.0, 500, uniform(1, 9)), Constant(), policy="naive", limits=BatchLimits(max_batch=7))
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
    limits = BatchLimits(max_batch=16, max_tokens=1000, max_wait_s=0.2)
    found = simulate(trace, PaddedGpu(), policy=policy, trigger=trigger, limits=limits, replicas=3, timeout_s=0.05)
    assert (found.latency_s > 0).all() and found.batch_sizes.sum() == len(trace)
    assert found.latency_s.max() < 10


def test_the_published_shape():
    """Fang et al., 2021: lengths 2..100: nobatch < naive < dp; lengths 5..500: naive loses to nobatch."""
    capacity = {}
    for low, high in ((2, 100), (5, 500)):
        trace = poisson(1e5, 3000, uniform(low, high), seed=1)  # all at once: what can be borne
        for policy in ("nobatch", "naive", "dp"):
            found = simulate(trace, PaddedGpu(), policy=policy, limits=BatchLimits(max_batch=20))
            capacity[high, policy] = found.throughput
    assert capacity[100, "nobatch"] < capacity[100, "naive"] < capacity[100, "dp"]
    assert capacity[500, "naive"] < capacity[500, "nobatch"] <= capacity[500, "dp"]


def test_deadlines_reach_the_policy():
    trace = poisson(250.0, 4000, uniform(2, 500), seed=3)
    in_time = {}
    for policy in ("nobatch", "deadline"):
        found = simulate(trace, PaddedGpu(), policy=policy, limits=BatchLimits(max_batch=8), timeout_s=0.1)
        in_time[policy] = (found.latency_s < 0.1).sum()
    assert in_time["deadline"] > in_time["nobatch"]


def test_a_load_that_can_be_borne_and_one_that_cannot():
    for load, bounded in ((0.5, True), (0.8, True), (1.2, False)):
        for seed in range(5):
            trace = poisson(load, 2000, uniform(1, 1), seed)
            assert is_bounded(trace, simulate(trace, Constant(), policy="nobatch").latency_s) == bounded


def test_many_requests_over_many_replicas():
    """Progress is reported, and the queue does not grow with the stream; `scripts/bench scheduler` measures time."""
    said: list[int] = []
    trace = poisson(64 * 0.8 / 2.5e-3, 120_000, uniform(2, 100), seed=1)
    found = simulate(trace, PaddedGpu(), policy="dp", replicas=64, say=said.append)
    assert said == sorted(said) and said[-1] >= 100_000
    assert found.busy < 1 and is_bounded(trace, found.latency_s)


class StepByStep:
    """Holds every batch of a fake model until the test lets it go, and keeps the first token of each sequence."""

    def __init__(self, fake):
        self.batches: list[list[int]] = []
        self._started, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._answer, fake.answer = fake.answer, self._held

    def _held(self, parts, output=None):
        self.batches.append([int(part.token_ids[0]) for part in parts])
        self._started.release()
        assert self._go.acquire(timeout=60)
        return self._answer(parts, output)

    def wait_for_batch(self):
        assert self._started.acquire(timeout=60)

    def let_go(self):
        self._go.release()


def batches_of(trace, found, cost) -> list[tuple[float, list[int]]]:
    """When each batch of a simulation with one replica began, and the numbers of its requests."""
    ends = trace.arrival_s + found.latency_s
    groups = [np.flatnonzero(ends == end).tolist() for end in np.unique(ends)]
    return [(float(ends[group[0]] - cost(trace.lengths[group].tolist())), group) for group in groups]


@pytest.mark.parametrize("policy", ["nobatch", "naive", "dp", "dp_latency"])
def test_the_engine_runs_the_batches_that_the_simulator_says(fakes, policy, monkeypatch):
    """The engine gets each request when the simulated batch before has begun, and may run one batch at a time."""
    monkeypatch.setattr(RefinedCost, "observe", lambda *_: None)  # by the clock, which this test is not to depend on
    fake, cost, trace = fakes(), PaddedGpu(), poisson(330.0, 150, uniform(2, 300), seed=1)
    steps = StepByStep(fake)
    with Engine(fake, policy=policy, cost=cost, cache=0, max_wait_s=None, progress=False) as serving:
        found = simulate(trace, RefinedCost(cost), policy=policy, limits=serving.limits)
        wanted = batches_of(trace, found, cost)
        futures, running = [], False
        for began_s, _ in wanted:
            due = [i for i in range(len(futures), len(trace)) if trace.arrival_s[i] <= began_s + 1e-9]
            idle = len(futures) == sum(map(len, steps.batches))  # then the next request finds nothing that runs
            if running and idle:
                steps.let_go()
                futures[-1].result(60)
            futures += [serving.submit([i] * trace.lengths[i]) for i in due]
            if running and not idle:
                steps.let_go()
            steps.wait_for_batch()
            running = True
        steps.let_go()
        for future in futures:
            future.result(60)
    assert [sorted(batch) for batch in steps.batches] == [sorted(batch) for _, batch in wanted]
    assert serving.statistics.batch_size.mean == found.batch_sizes.mean()
    assert policy == "nobatch" or found.batch_sizes.max() > 2


def test_no_replicas():
    with pytest.raises(InputError, match="at least one replica"):
        simulate(trace_of([0.0]), Constant(), replicas=0)
