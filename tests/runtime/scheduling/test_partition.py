"""Partitions: against all set partitions, runs against subsets, and what all runs amount to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.artifact.cost_spec import CostSpec
from turbo_tvm.runtime.scheduling import partition
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
from turbo_tvm.runtime.scheduling.cost_model import RefinedCost, cost_of
from turbo_tvm.runtime.scheduling.scheduler import POLICIES

PACKED = CostSpec("packed", terms=(0.01, 1e-4, 1e-7, 5e-4, 3e-4, 6e-4), knots=(64, 256))  # bends down, then up
PADDED = CostSpec("padded", lengths=(8, 64, 512), batches=(1, 8), seconds=((0.01, 0.05), (0.04, 0.3), (0.4, 3.0)))


def requests_of(lengths: Sequence[int]) -> list[Request]:
    return [Request(i, n, arrival_s=0.001 * i) for i, n in enumerate(lengths)]


class Padded:
    """A random table of seconds that grows with length and batch."""

    def __init__(self, seed: int, longest: int = 12, most: int = 9):
        rng = np.random.default_rng(seed)
        table = rng.exponential(1.0, (longest + 1, most + 1)) ** rng.integers(1, 4)
        self.table = table.cumsum(0).cumsum(1) + rng.exponential(rng.choice([0.0, 3.0, 30.0]))

    def __call__(self, lengths: Sequence[int]) -> float:
        return float(self.table[max(lengths), len(lengths)])


class Packed:
    """A fixed cost, and what grows with tokens and squared lengths, concave or convex."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.fixed, self.token, self.square = rng.exponential([5.0, 1.0, 0.1])
        self.power = rng.choice([0.7, 1.0, 1.5, 2.0])

    def __call__(self, lengths: Sequence[int]) -> float:
        return self.fixed + self.token * sum(lengths) ** self.power + self.square * sum(n * n for n in lengths)


class Arbitrary:
    """Nothing but growth: a batch costs more than each batch within it, by whatever it pleases."""

    def __init__(self, seed: int):
        self.seed = seed
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, lengths: Sequence[int]) -> float:
        key = tuple(sorted(lengths))
        if key not in self.known:
            within = max((self(key[:i] + key[i + 1 :]) for i in range(len(key)) if len(key) > 1), default=0.0)
            shorter = max(
                (self((*key[:i], key[i] - 1, *key[i + 1 :])) for i in range(len(key)) if key[i] > 1), default=0.0
            )
            step = np.random.default_rng((self.seed, *key)).exponential()
            self.known[key] = max(within, shorter) + float(step)
        return self.known[key]


@cache
def all_partitions(count: int) -> np.ndarray:
    """Every set partition of so many items: (partitions, count) of bit masks, 0 where there are fewer batches."""
    found = [masks + [0] * (count - len(masks)) for masks in _partitions(count)]
    return np.array(found)


def _partitions(count: int) -> Iterator[list[int]]:
    if not count:
        yield []
        return
    bit = 1 << (count - 1)
    for smaller in _partitions(count - 1):
        yield [*smaller, bit]
        for i, mask in enumerate(smaller):
            yield [*smaller[:i], mask | bit, *smaller[i + 1 :]]


def least(lengths: Sequence[int], cost, limits: BatchLimits) -> float:
    """The least total over all set partitions within the limits."""
    count = len(lengths)
    prices = np.zeros(1 << count)
    for mask in range(1, 1 << count):
        chosen = [lengths[i] for i in range(count) if mask >> i & 1]
        prices[mask] = cost(chosen) if limits.allow(chosen) else math.inf
    return float(prices[all_partitions(count)].sum(1).min())


def total(batches: Sequence[Sequence[int]], lengths: Sequence[int], cost) -> float:
    return sum(cost([lengths[i] for i in batch]) for batch in batches)


def check_dp(lengths: list[int], cost, limits: BatchLimits) -> None:
    found = POLICIES["dp"](requests_of(lengths), cost, limits)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert all(limits.allow([lengths[i] for i in batch]) for batch in found)
    assert total(found, lengths, cost) == pytest.approx(least(lengths, cost, limits))


def test_the_number_of_set_partitions():
    assert [len(all_partitions(n)) for n in range(1, 10)] == [1, 2, 5, 15, 52, 203, 877, 4140, 21147]


@pytest.mark.parametrize("kind", [Padded, Packed])
def test_dp_is_as_good_as_every_partition(kind):
    """2,000 cases: up to nine requests, costs that grow with length and batch, with and without caps."""
    rng = np.random.default_rng(1)
    for seed in range(1000):
        lengths = rng.integers(1, 13, int(rng.integers(1, 10))).tolist()
        caps = {
            "max_batch": int(rng.integers(1, 10)) if seed % 2 else None,
            "max_tokens": int(rng.integers(12, 60)) if seed % 5 == 0 else None,
        }
        check_dp(lengths, kind(seed), BatchLimits(**caps))


def test_dp_is_as_good_as_every_partition_whatever_the_cost():
    rng = np.random.default_rng(2)
    for seed in range(40):
        lengths = rng.integers(1, 4, int(rng.integers(1, 8))).tolist()
        check_dp(lengths, Arbitrary(seed), BatchLimits())


def test_a_cap_on_bytes():
    limits = BatchLimits(max_bytes=130, peak_bytes=lambda lengths: 10 * sum(lengths))
    rng = np.random.default_rng(3)
    for seed in range(40):
        check_dp(rng.integers(1, 9, 6).tolist(), Padded(seed), limits)


@pytest.mark.parametrize("spec", [PACKED, PADDED], ids=["packed", "padded"])
def test_dp_is_as_good_as_every_partition_with_the_costs_that_engines_have(spec):
    rng = np.random.default_rng(4)
    for seed in range(60):
        cost = RefinedCost(cost_of(spec))
        for lengths in ([5], [200] * 9):
            cost.observe(lengths, cost(lengths) * float(rng.uniform(0.3, 3)))
        lengths = rng.integers(1, 500, int(rng.integers(1, 9))).tolist()
        check_dp(lengths, cost, BatchLimits(max_tokens=1500 if seed % 2 else None))


def runs_of(starts: list[int], count: int) -> list[list[int]]:
    return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def test_runs_of_padded_requests_are_as_good_as_every_partition():
    """Up to nine against all partitions, eleven against subsets: what holds for more than `EXACT` requests."""
    rng = np.random.default_rng(5)
    for seed in range(400):
        lengths = sorted(rng.integers(1, 13, int(rng.integers(1, 10))).tolist())
        limits = BatchLimits(max_batch=int(rng.integers(1, 10)) if seed % 2 else None)
        starts = partition.best_runs(lengths, Padded(seed), limits)
        found = total(runs_of(starts, len(lengths)), lengths, Padded(seed))
        assert found == pytest.approx(least(lengths, Padded(seed), limits))
    for seed in range(3):
        lengths, cost = sorted(rng.integers(1, 13, 11).tolist()), Padded(seed, most=11)
        found = total(runs_of(partition.best_runs(lengths, cost, BatchLimits()), 11), lengths, cost)
        assert found == pytest.approx(total(partition.best_subsets(lengths, cost, BatchLimits()), lengths, cost))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=25),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 120),
    st.none() | st.integers(1, 120),
)
def test_prices_over_arrays_are_those_one_by_one(lengths, max_batch, max_tokens, max_bytes):
    class Noted:
        """Over arrays: what a run amounts to, as digits of a number."""

        def batches(self, counts, tokens, squares, longest):
            return counts + 1e2 * longest + 1e5 * tokens + 1e9 * squares

        def __call__(self, chosen):
            return float(self.batches(len(chosen), sum(chosen), sum(n * n for n in chosen), max(chosen)))

    limits = BatchLimits(max_batch, max_tokens, max_bytes, peak_bytes=sum)
    prices = partition.run_prices(lengths, Noted(), limits)
    slow = partition.run_prices(lengths, lambda chosen: Noted()(chosen), limits)
    np.testing.assert_array_equal(prices, slow)
    window = prices.shape[1]
    for end in range(1, len(lengths) + 1):
        for size in range(1, len(lengths) + 1):
            run = lengths[end - size : end] if size <= end else []
            allowed = bool(run) and limits.allow(run)
            if size > window:
                assert not allowed
            else:
                assert prices[end - 1, window - size] == (Noted()(run) if allowed else math.inf)
    np.testing.assert_array_equal(partition.run_prices(lengths, Noted(), limits, only_last=True)[0], prices[-1])


class TestEarliestRuns:
    def test_without_hurry_all_run_together(self):
        runs = partition.EarliestRuns(lambda lengths: 1.0, BatchLimits())
        for length in (3, 5, 7):
            runs.append(length, math.inf)
        assert runs.on_time and runs.starts() == [0]

    def test_what_is_due_early_runs_first(self):
        runs = partition.EarliestRuns(lambda lengths: float(sum(lengths)), BatchLimits(now_s=10.0))
        runs.append(3, 13.0)
        runs.append(5, 18.0)
        assert runs.on_time and runs.starts() == [0, 1]

    def test_removing_is_as_never_having_appended(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            lengths = rng.integers(1, 9, 8).tolist()
            due = np.sort(rng.integers(5, 60, 8)).astype(float).tolist()
            gone = int(rng.integers(8))
            runs, others = (partition.EarliestRuns(Packed(1), BatchLimits(max_batch=3)) for _ in range(2))
            for i in range(8):
                runs.append(lengths[i], due[i])
                if i != gone:
                    others.append(lengths[i], due[i])
            runs.remove(gone)
            assert runs.on_time == others.on_time and runs.starts() == others.starts()
