"""The policies: every request in one batch, caps, priorities, fairness, and what each is for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling import scheduler
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
from turbo_tvm.runtime.scheduling.scheduler import LOOKED_AT, POLICIES, next_batch


def requests_of(lengths: Sequence[int], **fields) -> list[Request]:
    return [Request(i, n, arrival_s=0.001 * i, **fields) for i, n in enumerate(lengths)]


class Linear:
    """A packed cost over arrays."""

    def __call__(self, lengths: Sequence[int]) -> float:
        return float(self.batches(len(lengths), sum(lengths), sum(n * n for n in lengths), max(lengths)))

    def batches(self, counts, tokens, squares, longest):
        return 1e-3 + 1e-5 * counts + 1e-5 * tokens + 1e-8 * squares


def convex(lengths: Sequence[int]) -> float:
    """Large batches cost more than their parts."""
    return 5 + sum(lengths) ** 1.5


def padded(lengths: Sequence[int]) -> float:
    return 2.0 + 1.0 * len(lengths) * max(lengths)


def alone(lengths: Sequence[int]) -> float:
    return float(sum(lengths))


limits = st.builds(
    BatchLimits,
    max_batch=st.none() | st.integers(1, 5),
    max_tokens=st.integers(1, 200),
    max_bytes=st.none() | st.integers(1, 1000),
    peak_bytes=st.just(lambda lengths: 10 * sum(lengths) + 3 * len(lengths)),
    max_wait_s=st.none() | st.floats(0, 0.02),
    now_s=st.just(0.02),
)
waiting = st.lists(
    st.tuples(st.integers(1, 100), st.floats(0, 0.02), st.none() | st.floats(0, 0.5), st.integers(-1, 1)), max_size=20
).map(lambda rows: [Request(i, *row) for i, row in enumerate(rows)])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cost", [Linear(), convex], ids=["over arrays", "one by one"])
@settings(max_examples=50, deadline=None)
@given(waiting, limits)
def test_every_request_is_in_one_batch_and_caps_bind(policy, cost, waiting, limits):
    found = POLICIES[policy](waiting, cost, limits)
    assert sorted(itertools.chain(*found)) == [r.id for r in waiting]
    by_id = {r.id: r for r in waiting}
    for batch in found:
        assert batch and limits.allow([by_id[i].length for i in batch])


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=50, deadline=None)
@given(waiting.filter(len), limits)
def test_whoever_waited_longest_is_next_once_that_is_too_long(policy, waiting, limits):
    waiting = sorted(waiting, key=lambda r: r.arrival_s)
    chosen = next_batch(waiting, POLICIES[policy], Linear(), limits)
    if limits.overdue(waiting[0]):
        oldest = waiting[0].arrival_s
        assert any(r.arrival_s == oldest for r in waiting if r.id in chosen)
    assert sorted(chosen) == sorted(set(chosen)) and set(chosen) <= {r.id for r in waiting}


@pytest.mark.parametrize("policy", ["nobatch", "dp", "dp_latency", "deadline"])
def test_higher_priorities_run_first(policy):
    waiting = [Request(i, n, priority=i % 3) for i, n in enumerate((50, 4, 90, 3, 60, 2))]
    order = [i for batch in POLICIES[policy](waiting, Linear(), BatchLimits()) for i in batch]
    assert [i % 3 for i in order] == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("policy", ["nobatch", "naive", "token_budget"])
def test_first_come_first_served_needs_no_look_at_those_behind(policy):
    waiting = requests_of(np.random.default_rng(0).integers(1, 50, 40).tolist())
    caps = BatchLimits(max_batch=8, max_tokens=100)
    assert next_batch(waiting, POLICIES[policy], Linear(), caps) == POLICIES[policy](waiting, Linear(), caps)[0]


def test_nobatch_is_first_come_first_served():
    waiting = [Request("b", 3, 2.0), Request("a", 9, 1.0)]
    assert POLICIES["nobatch"](waiting, Linear(), BatchLimits()) == [["a"], ["b"]]


def test_naive_takes_all_that_waits():
    assert POLICIES["naive"](requests_of((90, 1, 40)), Linear(), BatchLimits()) == [[0, 1, 2]]
    assert POLICIES["naive"](requests_of((90, 1, 40)), Linear(), BatchLimits(max_batch=2)) == [[0, 1], [2]]


def test_token_budget_closes_a_batch_when_the_next_request_is_too_much():
    found = POLICIES["token_budget"](requests_of((60, 30, 20, 200, 1)), Linear(), BatchLimits(max_tokens=100))
    assert found == [[0, 1], [2], [3], [4]]


def test_token_budget_needs_a_budget():
    with pytest.raises(InputError, match="max_tokens"):
        POLICIES["token_budget"](requests_of((1,)), Linear(), BatchLimits())


def test_dp_pads_short_with_short():
    batches = POLICIES["dp"](requests_of((2, 500, 3, 490)), padded, BatchLimits())
    assert sorted(map(sorted, batches)) == [[0, 2], [1], [3]]


def test_dp_runs_first_what_answers_most_requests_per_second():
    lengths = (400, 2, 3, 2, 390, 3)
    found = POLICIES["dp"](requests_of(lengths), padded, BatchLimits())
    rates = [len(batch) / padded([lengths[i] for i in batch]) for batch in found]
    assert rates == sorted(rates, reverse=True) and set(found[0]) <= {1, 2, 3, 5}


def mean_completion(batches, lengths, cost) -> float:
    now, answered = 0.0, 0.0
    for batch in batches:
        now += cost([lengths[i] for i in batch])
        answered += now * len(batch)
    return answered / len(lengths)


def test_dp_latency_is_as_good_as_every_partition_into_runs_of_the_order_of_length():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        lengths = sorted(rng.integers(1, 30, 7).tolist())
        found = POLICIES["dp_latency"](requests_of(lengths), convex if seed % 2 else padded, BatchLimits())
        cost = convex if seed % 2 else padded
        best = min(
            mean_completion([list(range(a, b)) for a, b in itertools.pairwise((0, *cuts, 7))], lengths, cost)
            for size in range(7)
            for cuts in itertools.combinations(range(1, 7), size)
        )
        assert mean_completion(found, lengths, cost) <= best * (1 + 1e-9)


class TestDeadline:
    def on_time(self, batches, waiting, cost) -> int:
        by_id = {r.id: r for r in waiting}
        now, kept = 0.0, 0
        for batch in batches:
            now += cost([by_id[i].length for i in batch])
            kept += sum(by_id[i].deadline_s is None or now <= by_id[i].deadline_s for i in batch)
        return kept

    def test_of_single_requests_is_the_most_there_can_be(self):
        for seed in range(100):
            rng = np.random.default_rng(seed)
            waiting = [Request(i, int(rng.integers(1, 9)), deadline_s=float(rng.integers(1, 20))) for i in range(6)]
            found = POLICIES["deadline"](waiting, alone, BatchLimits(max_batch=1))
            best = max(self.on_time([[i] for i in p], waiting, alone) for p in itertools.permutations(range(6)))
            assert self.on_time(found, waiting, alone) == best

    def test_keeps_as_many_as_first_come_first_served_under_any_load(self):
        for seed in range(60):
            rng = np.random.default_rng(seed)
            waiting = [
                Request(i, int(rng.integers(1, 100)), i * 1e-4, deadline_s=float(rng.uniform(0, 0.05)))
                for i in range(int(rng.integers(1, 200)))
            ]
            kept = {
                policy: self.on_time(POLICIES[policy](waiting, Linear(), BatchLimits(max_batch=16)), waiting, Linear())
                for policy in ("deadline", "naive", "nobatch")
            }
            assert kept["deadline"] >= max(kept.values()) * 0.95, (seed, kept)

    def test_batches_where_that_keeps_a_deadline(self):
        waiting = [Request(i, 5, deadline_s=1.5) for i in range(4)]
        assert POLICIES["deadline"](waiting, lambda lengths: 1.0, BatchLimits()) == [[0, 1, 2, 3]]

    def test_what_cannot_make_it_runs_last_and_what_has_no_deadline_before_it(self):
        waiting = [Request("late", 9, deadline_s=1.0), Request("a", 1, deadline_s=2.0), Request("b", 1)]
        assert POLICIES["deadline"](waiting, alone, BatchLimits(max_batch=1)) == [["a"], ["b"], ["late"]]

    def test_more_than_are_looked_at(self):
        waiting = [Request(i, 1, deadline_s=1e6 + i) for i in range(3 * LOOKED_AT)]
        found = POLICIES["deadline"](waiting, alone, BatchLimits(max_batch=4))
        assert sorted(itertools.chain(*found)) == list(range(3 * LOOKED_AT))
        assert set(itertools.chain(*found[: LOOKED_AT // 4])) == set(range(LOOKED_AT))


@pytest.mark.parametrize("policy", POLICIES)
def test_no_requests_no_batches(policy):
    assert POLICIES[policy]([], Linear(), BatchLimits(max_tokens=5)) == []


def test_policies_have_names():
    assert all(scheduler.policy(name) is POLICIES[name] for name in POLICIES)
    with pytest.raises(InputError, match="no scheduling policy 'best'; use one of nobatch, naive"):
        scheduler.policy("best")


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_tokens": -1}, {"max_bytes": 0, "peak_bytes": sum}])
def test_limits_are_at_least_one(wrong):
    with pytest.raises(InputError, match="at least 1"):
        BatchLimits(**wrong)


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_a_limit_on_waiting_is_not_negative(wrong):
    with pytest.raises(InputError, match="max_wait_s"):
        BatchLimits(max_wait_s=wrong)


def test_a_cap_on_bytes_needs_to_know_them():
    with pytest.raises(InputError, match="peak_bytes"):
        BatchLimits(max_bytes=5)


def test_limits_at_another_time():
    limits = BatchLimits(max_batch=3, max_wait_s=1.0, now_s=5.0)
    assert limits.at(7.0) == BatchLimits(max_batch=3, max_wait_s=1.0, now_s=7.0)
    assert limits.overdue(Request(0, 1, arrival_s=4.0)) and not limits.overdue(Request(0, 1, arrival_s=4.5))
