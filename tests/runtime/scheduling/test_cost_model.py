"""Cost models: what they recover from measured batches, which kind is taken, and how far live batches move them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.artifact.cost_spec import CostSpec, check_cost
from turbo_tvm.errors import ArtifactError, InputError
from turbo_tvm.runtime.scheduling import cost_measurement, cost_model
from turbo_tvm.runtime.scheduling.cost_model import PackedCost, PaddedCost, Point, RefinedCost, cost_of, fit, mean_error

PACKED = CostSpec("packed", terms=(0.01, 1e-4, 1e-7, 5e-4, 3e-4), knots=(64,))
PADDED = CostSpec("padded", lengths=(8, 64, 512), batches=(1, 8), seconds=((0.01, 0.05), (0.04, 0.3), (0.4, 3.0)))
SPECS = [PACKED, PADDED]

GRID = [(n,) * k for n in (8, 16, 32, 64, 128, 256, 512) for k in (1, 4, 16)]
RAGGED = [(3, 80, 20, 41), (500, 12), (7, 9, 200, 31, 64, 2)]


def packed_truth(lengths: Sequence[int]) -> float:
    return 0.012 + 2e-5 * len(lengths) + 4e-4 * sum(lengths) + 1.3e-7 * sum(n * n for n in lengths)


def padded_truth(lengths: Sequence[int]) -> float:
    whole = [max(lengths)] * len(lengths)
    return packed_truth(whole)


def points(truth, batches=GRID, noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [Point(tuple(b), truth(b) * float(np.exp(noise * rng.normal()))) for b in batches]


def test_a_packed_cost_by_hand():
    cost = PackedCost(PACKED)
    assert cost([10, 20]) == pytest.approx(0.01 + 2e-4 + 30 * 5e-4 + 500e-7)
    assert cost([100]) == pytest.approx(0.01 + 1e-4 + 64 * 5e-4 + 36 * 3e-4 + 1e-3)


def test_a_padded_cost_by_hand():
    cost = PaddedCost(PADDED)
    assert cost([8]) == pytest.approx(0.01)
    assert cost([3, 64, 9]) == pytest.approx(0.04 + (0.3 - 0.04) * 2 / 7)
    assert cost([36]) == pytest.approx(0.025)
    assert cost([64] * 16) == pytest.approx(0.6) and cost([1024]) == pytest.approx(0.8)  # beyond it: in proportion
    assert cost([1024] * 16) == pytest.approx(12.0)
    assert cost([1]) == pytest.approx(0.01)


@pytest.mark.parametrize("spec", SPECS, ids=["packed", "padded"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=70), min_size=1, max_size=5))
def test_arrays_cost_what_single_batches_do(spec, batches):
    for cost in (cost_of(spec), refined(cost_of(spec))):
        found = cost.batches(
            np.array([len(b) for b in batches]),
            np.array([sum(b) for b in batches]),
            np.array([sum(n * n for n in b) for b in batches]),
            np.array([max(b) for b in batches]),
        )
        np.testing.assert_allclose(found, [cost(b) for b in batches], rtol=1e-9)
        assert (found > 0).all()


def refined(base) -> RefinedCost:
    cost = RefinedCost(base)
    cost.observe([10], 3 * base([10]))
    cost.observe([400] * 8, 0.5 * base([400] * 8))
    return cost


@pytest.mark.parametrize("spec", SPECS, ids=["packed", "padded"])
def test_more_never_costs_less(spec):
    cost = cost_of(spec)
    for lengths in [*GRID, (600,) * 3, (1,) * 90, (5000,) * 200]:
        assert cost([n + 1 for n in lengths]) >= cost(lengths)
        assert cost([*lengths, lengths[0]]) >= cost(lengths)


def test_fits_recover_the_truth():
    assert mean_error(PackedCost.fit(points(packed_truth)), points(packed_truth, RAGGED)) < 0.002
    assert mean_error(PaddedCost.fit(points(padded_truth)), points(padded_truth, RAGGED)) < 0.03


def test_fits_bear_noise():
    for seed in range(10):
        cost = PackedCost.fit(points(packed_truth, noise=0.05, seed=seed))
        assert mean_error(cost, points(packed_truth, RAGGED)) < 0.12
        assert min(cost.spec.terms) >= 0


def test_a_table_has_a_value_where_nothing_was_measured():
    some = [b for b in GRID if sum(b) <= 1024]
    cost = PaddedCost.fit(points(padded_truth, some))
    assert cost([512] * 16) == pytest.approx(padded_truth([512] * 16), rel=0.15)


def test_a_table_never_falls():
    noisy = PaddedCost.fit(points(padded_truth, noise=0.3)).spec.seconds
    assert (np.diff(noisy, axis=0) >= 0).all() and (np.diff(noisy, axis=1) >= 0).all()


def test_a_table_of_one_batch():
    cost = PaddedCost.fit([Point((8,), 0.01)])
    assert cost([8]) == pytest.approx(0.01) and cost([8] * 200) >= 0.03
    with pytest.raises(InputError, match="equal lengths"):
        PaddedCost.fit([Point((8, 9), 0.01)])


@pytest.mark.parametrize(("truth", "kind"), [(packed_truth, "packed"), (padded_truth, "padded")])
def test_the_kind_that_predicts_better_is_taken(truth, kind):
    spec = fit(points(truth), points(truth, RAGGED))
    assert spec.kind == kind
    assert 0 <= spec.error < 0.05
    assert spec.points == len(GRID) + len(RAGGED)
    check_cost(spec, "cost")


def test_least_squares_without_negative_terms():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows, wanted = rng.random((12, 4)), rng.normal(size=12)
        found = cost_model._non_negative_least_squares(rows, wanted)
        assert (found >= 0).all()
        gradient = rows.T @ (rows @ found - wanted)  # of Karush, Kuhn and Tucker's conditions
        assert (gradient > -1e-6).all() and np.abs(gradient * found).max() < 1e-6


class TestRefined:
    def test_follows_what_batches_take(self):
        cost = RefinedCost(cost_of(PACKED))
        for _ in range(200):
            for lengths in ([8], [100, 30], [200] * 8):
                cost.observe(lengths, 1.5 * cost.base(lengths))
        for lengths in ([8], [100, 30], [200] * 8, [500]):
            assert cost(lengths) == pytest.approx(1.5 * cost.base(lengths), rel=0.02)

    def test_learns_that_small_batches_are_slower_and_large_ones_faster(self):
        cost = RefinedCost(cost_of(PACKED))
        for _ in range(400):
            cost.observe([1], 1.6 * cost.base([1]))
            cost.observe([256] * 64, 0.7 * cost.base([256] * 64))
        assert cost([1]) == pytest.approx(1.6 * cost.base([1]), rel=0.15)
        assert cost([256] * 64) == pytest.approx(0.7 * cost.base([256] * 64), rel=0.05)

    def test_an_outlier_moves_it_by_little(self):
        cost = RefinedCost(cost_of(PACKED))
        cost.observe([100], 1000.0)
        assert 1.0 < cost([100]) / cost.base([100]) < 1.05

    def test_is_bounded(self):
        cost = RefinedCost(cost_of(PACKED))
        for _ in range(2000):
            cost.observe([100], 1e9)
            cost.observe([5000], 1e-12)
        assert all(1 / 4 - 1e-9 <= c <= 4 + 1e-9 for c in cost.corrections)

    @pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
    def test_leaves_what_is_no_time_alone(self, wrong):
        cost = RefinedCost(cost_of(PACKED))
        cost.observe([100], wrong)
        assert cost.corrections == (1.0, 1.0)

    def test_fitted_to_many_batches_at_once(self):
        base = cost_of(PACKED)
        rng = np.random.default_rng(0)
        seen = [([int(n)], base([int(n)]) * 1.3 * float(np.exp(0.1 * rng.normal()))) for n in rng.integers(2, 500, 300)]
        cost = RefinedCost.fitted(base, seen)
        assert sum(cost(b) for b, _ in seen) == pytest.approx(sum(s for _, s in seen), rel=0.01)

    def test_of_a_plain_function(self):
        cost = RefinedCost(packed_truth)
        cost.observe([100], 2 * packed_truth([100]))
        assert cost([100]) > packed_truth([100])
        assert cost.batches is None

    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
    def test_of_a_function_that_is_no_cost(self, value):
        cost = RefinedCost(lambda lengths: value)
        cost.observe([100], 1.0)
        assert cost.corrections == (1.0, 1.0)

    def test_fitted_to_one_batch(self):
        cost = RefinedCost.fitted(cost_of(PACKED), [([30], 1.2 * cost_of(PACKED)([30]))])
        assert cost([30]) == pytest.approx(1.2 * cost.base([30]), rel=0.01)


class Device:
    """A clock that a batch moves by its cost."""

    def __init__(self, cost):
        self.cost, self.now = cost, 0.0
        self.ran: list[tuple[int, ...]] = []

    def run(self, lengths: Sequence[int]) -> None:
        self.ran.append(tuple(lengths))
        self.now += self.cost(lengths)

    def measure(self, **options):
        return cost_measurement.measure(self.run, clock=lambda: self.now, **options)


class TestMeasurement:
    @pytest.mark.parametrize("scale", [0.001, 0.1, 1.0, 3.0])
    def test_keeps_to_its_budget(self, scale):
        device = Device(lambda lengths: scale * packed_truth(lengths))
        found, held_out = device.measure(max_length=512, max_tokens=8192, budget_s=5.0)
        assert device.now < 7.5
        assert len(found) >= 3 and len(held_out) >= 2
        spec = fit(found, held_out)
        if scale <= 1:  # a slower device leaves few points: too few to tell the kinds apart
            assert spec.kind == "packed" and mean_error(cost_of(spec), points(device.cost, RAGGED)) < 0.1

    def test_a_device_that_is_far_too_slow_is_measured_at_its_ends(self):
        device = Device(lambda lengths: 100 * packed_truth(lengths))
        found, _ = device.measure(max_length=512, max_tokens=8192, budget_s=1.0)
        assert [p.lengths for p in found] == [(8,), (512,)]

    @pytest.mark.parametrize("max_length", [1, 2, 7, 40, 300, 2048])
    def test_never_runs_what_the_model_cannot(self, max_length):
        device = Device(packed_truth)
        found, held_out = device.measure(max_length=max_length, max_tokens=256, budget_s=5.0)
        assert all(1 <= n <= max_length for b in device.ran for n in b)
        assert all(sum(b) <= max(256, max_length) for b in device.ran)
        assert fit(found, held_out).points == len(found) + len(held_out)

    def test_images_are_all_of_one_length(self):
        device = Device(packed_truth)
        found, held_out = device.measure(max_length=577, max_tokens=8192, min_length=577)
        assert {n for b in device.ran for n in b} == {577}
        assert {len(p.lengths) for p in found} == {1, 4}
        spec = fit(found, held_out)
        assert cost_of(spec)((577,) * 3) == pytest.approx(packed_truth((577,) * 3), rel=0.2)

    def test_says_what_it_does(self):
        said: list[str] = []
        Device(packed_truth).measure(max_length=512, max_tokens=8192, say=said.append)
        assert any("of 4: 6 x " in line for line in said) and any("1 x 512 tokens" in line for line in said)


@pytest.mark.parametrize("spec", SPECS, ids=["packed", "padded"])
def test_a_spec_survives_json(spec):
    check_cost(spec, "costs")
    plain = json.loads(json.dumps(dataclasses.asdict(spec)))
    assert plain["kind"] == spec.kind and tuple(plain["knots"]) == spec.knots


@pytest.mark.parametrize(
    ("spec", "wrong", "message"),
    [
        (PACKED, {"terms": (1.0, 0.0)}, "5 numbers"),
        (PACKED, {"terms": (-1.0, 0.0, 0.0, 0.0, 1.0)}, "seconds from 0"),
        (PACKED, {"terms": (0.0, 0.0, 0.0, 0.0, 1.0)}, "not all of the first four 0"),
        (PACKED, {"knots": (0,)}, "increasing"),
        (PADDED, {"lengths": (8, 8, 9)}, "increasing"),
        (PADDED, {"lengths": (8,), "seconds": ((1.0, 2.0),)}, "at least two lengths"),
        (PADDED, {"seconds": ((1.0, 2.0),)}, "3 rows of 2"),
        (PADDED, {"seconds": ((1.0, 2.0), (1.0, 0.0), (1.0, 2.0))}, "above 0"),
    ],
)
def test_figures_that_are_no_cost_are_refused(spec, wrong, message):
    with pytest.raises(ArtifactError, match=message):
        check_cost(dataclasses.replace(spec, **wrong), "costs.'a CPU'")
