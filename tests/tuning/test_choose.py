"""From trials to variants: never worse than the default, few, and merged where neighbours agree."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.schedules.common.space import Knob, Space, Variant, checked
from turbo_tvm.tuning.choose import LEAST_GAIN, VARIANT_COST, Choice, finalists, mean_gain, one_for_all, variants
from turbo_tvm.tuning.search import Observation, key

ALL_BOUNDS = {16: 32, 64: 128, 256: 512, 1024: None}
SPACE = Space((Knob("a", tuple(range(20)), 0, ""),))


@st.composite
def finals(draw):
    """Buckets, and settings that were timed in some of them, their gains around 1."""
    count = draw(st.integers(1, 4))
    bounds = dict(list(ALL_BOUNDS.items())[:count])
    bounds[list(bounds)[-1]] = None
    gain = st.one_of(st.floats(0.01, 3.0), st.sampled_from([1.0, LEAST_GAIN, 1.02]))
    names = draw(st.lists(st.integers(1, 19), max_size=8, unique=True))
    some = st.lists(st.sampled_from(list(bounds)), unique=True)
    whole = st.just(list(bounds))
    final = [Observation({"a": i}, {rows: draw(gain) for rows in draw(st.one_of(whole, some))}) for i in names]
    weights = {rows: draw(st.floats(0.05, 1.0)) for rows in bounds}
    return final, bounds, weights


def used_for(choices, bound):
    """The setting for a bucket."""
    return next(c.setting for c in choices if c.max_rows is None or (bound is not None and bound <= c.max_rows))


@settings(max_examples=300, deadline=None)
@given(finals(), st.integers(1, 3))
def test_variants_of_any_final(case, most):
    final, bounds, _ = case
    choices, gains = variants(final, bounds, most)

    made = tuple(Variant(tuple(choice.setting.items()), choice.max_rows) for choice in choices)
    assert len(checked(made, SPACE)) == len(choices), "the bounds ascend and the last one is None"
    assert {c.max_rows for c in choices} <= set(bounds.values())
    assert all(a.setting != b.setting for a, b in itertools.pairwise(choices)), "neighbours that agree are one"
    assert len({key(choice.setting) for choice in choices}) <= most

    timed = {key(o.setting): o.gains for o in final}
    for rows, bound in bounds.items():
        setting = used_for(choices, bound)
        assert gains[rows] == (timed[key(setting)][rows] if setting else 1.0)
        assert gains[rows] >= 1.0, "never worse than the default, by its samples"


@settings(max_examples=200, deadline=None)
@given(finals())
def test_one_setting_for_all_rows(case):
    final, bounds, weights = case
    (choice,), gains = one_for_all(final, bounds, weights)
    assert choice.max_rows is None and list(gains) == list(bounds)
    whole = [o for o in final if set(o.gains) == set(bounds)]
    best = max([1.0, *(mean_gain(o.gains, weights) for o in whole)])
    assert mean_gain(gains, weights) == pytest.approx(best if best >= LEAST_GAIN else 1.0)
    assert bool(choice.setting) == (best >= LEAST_GAIN)


def test_nothing_to_choose_from_is_the_default():
    assert variants([], ALL_BOUNDS) == ([Choice({}, None)], dict.fromkeys(ALL_BOUNDS, 1.0))
    assert one_for_all([], ALL_BOUNDS, dict.fromkeys(ALL_BOUNDS, 1.0))[0] == [Choice({}, None)]


def test_a_setting_serves_its_neighbours_and_the_default_the_rest():
    final = [Observation({"a": 1}, {16: 1.3, 64: 1.2, 256: 1.0, 1024: 0.7})]
    choices, gains = variants(final, ALL_BOUNDS)
    assert choices == [Choice({"a": 1}, 128), Choice({}, None)]
    assert gains == {16: 1.3, 64: 1.2, 256: 1.0, 1024: 1.0}


def test_a_setting_may_come_twice():
    final = [Observation({"a": 1}, {16: 1.3, 64: 0.9, 256: 1.3, 1024: 1.3})]
    choices, _ = variants(final, ALL_BOUNDS)
    assert choices == [Choice({"a": 1}, 32), Choice({}, 128), Choice({"a": 1}, None)]


@pytest.mark.parametrize("gain,wanted", [(1.44, [1]), (1.48, [2, 1])])
def test_a_second_setting_must_be_worth_it(gain, wanted):
    first = Observation({"a": 1}, dict.fromkeys(ALL_BOUNDS, 1.2))
    second = Observation({"a": 2}, {16: gain, 64: 1.0, 256: 1.0, 1024: 1.0})
    choices, _ = variants([first, second], ALL_BOUNDS)
    assert [choice.setting["a"] for choice in choices] == wanted
    assert [choice.max_rows for choice in choices] == ([32, None] if wanted == [2, 1] else [None])


def test_settings_are_chosen_together():
    """The one that is best alone is of no use beside two others."""
    bounds = {16: 32, 64: None}
    final = [Observation({"a": i}, {16: x, 64: y}) for i, x, y in [(1, 1.5, 1.5), (2, 2.0, 1.0), (3, 0.9, 2.0)]]
    assert variants(final, bounds, most=2)[0] == [Choice({"a": 2}, 32), Choice({"a": 3}, None)]
    assert variants(final, bounds)[0] == [Choice({"a": 2}, 32), Choice({"a": 3}, None)]
    assert variants(final, bounds, most=1)[0] == [Choice({"a": 1}, None)]


@settings(max_examples=100, deadline=None)
@given(finals(), st.integers(1, 3))
def test_no_other_settings_are_worth_more(case, most):
    final, bounds, _ = case
    choices, gains = variants(final, bounds, most)
    default = Observation({}, dict.fromkeys(bounds, 1.0))

    def worth(best, count):
        return sum(math.log(best[rows]) for rows in bounds) / len(bounds) - math.log(VARIANT_COST) * (count - 1)

    mine = worth(gains, len({key(choice.setting) for choice in choices}))
    for count in range(1, most + 1):
        for some in itertools.combinations([default, *final], count):
            other = {rows: max(o.gains.get(rows, 0.0) for o in some) for rows in bounds}
            if min(other.values()) >= 1.0:
                assert worth(other, count) <= max(mine, math.log(LEAST_GAIN)) + 1e-9


def test_finalists_are_the_fastest_of_each_bucket_and_of_all():
    weights = {16: 0.5, 256: 0.5}
    seen = [Observation({"a": i}, {16: 1 + i / 10, 256: 1 - i / 20}) for i in range(1, 6)]
    seen += [Observation({"a": 10 + i}, {16: 0.5, 256: 1 + i / 10}) for i in range(1, 6)]
    seen += [Observation({"a": 18}, {16: 1.15, 256: 1.15}), Observation({"a": 19}, {})]
    chosen = [setting["a"] for setting in finalists(seen, weights)]
    assert set(chosen) >= {5, 4, 15, 14, 18}
    assert len(chosen) == len(set(chosen)) <= 9
    assert 19 not in chosen


def test_nobody_goes_to_the_final_who_gains_nothing():
    assert finalists([Observation({"a": 1}, {16: 1.005, 256: 0.99})], {16: 0.1, 256: 0.9}) == []
    assert finalists([Observation({"a": 1}, {})], {16: 1.0}) == []
    assert finalists([], {16: 1.0}) == []


def test_the_mean_gain_is_geometric_and_weighted():
    assert mean_gain({16: 2.0, 64: 0.5}, {16: 1.0, 64: 1.0}) == pytest.approx(1.0)
    assert mean_gain({16: 2.0, 64: 0.5}, {16: 3.0, 64: 1.0}) == pytest.approx(2.0**0.5)
    assert mean_gain({16: 4.0, 64: 9.0}, {16: 0.5}) == pytest.approx(4.0)
