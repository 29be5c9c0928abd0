"""What is tried next: never twice, the same for the same arguments, and better than by chance."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from turbo_tvm.schedules.common.space import Knob, Space
from turbo_tvm.tuning.search import SEARCHES, Observation, key, propose

WEIGHTS = {16: 0.25, 256: 0.75}
SMALL = Space((Knob("a", (1, 2, 4), 2, ""), Knob("b", (0, 1), 0, ""), Knob("c", (8, 16, 32), 8, "")))
UNEVEN = Space(SMALL.knobs, valid=lambda setting: setting["a"] != 4 or setting["c"] != 32)
WIDE = Space(tuple(Knob(name, (1, 2, 4, 8, 16, 32), 4, "") for name in "abcd"))  # 1,296 settings
LARGE = Space(tuple(Knob(name, tuple(range(8)), 0, "") for name in "abcde"))  # 32,768
ODD = Space(LARGE.knobs, valid=lambda setting: sum(setting.values()) % 2 == 0)


class Landscape:
    """Gains of settings: a best value for each knob and bucket, knobs that matter together, and noise."""

    def __init__(self, space: Space, seed: int):
        rng = np.random.default_rng(seed)
        self.space, self.noise = space, np.random.default_rng(seed + 1)
        self.best = {rows: rng.uniform(0, 1, len(space.knobs)) for rows in WEIGHTS}
        self.matters = rng.exponential(0.5, len(space.knobs))

    def gain(self, setting, rows: int) -> float:
        """Over the default, without noise."""
        return math.exp(self._worth(setting, rows) - self._worth(self.space.default, rows))

    def total(self, setting) -> float:
        """Over all buckets."""
        return math.exp(sum(weight * math.log(self.gain(setting, rows)) for rows, weight in WEIGHTS.items()))

    def measure(self, setting) -> Observation:
        if self.noise.random() < 0.05:
            return Observation(setting, {})
        return Observation(setting, {r: self.gain(setting, r) * self.noise.normal(1, 0.02) for r in WEIGHTS})

    def _worth(self, setting, rows: int) -> float:
        sizes = [len(knob.values) - 1 for knob in self.space.knobs]
        off = np.abs(np.array(self.space.features(setting)) / sizes - self.best[rows])
        return -float(self.matters @ off**2) - float(off[0] * off[1])


def tried(space: Space, landscape: Landscape, trials: int, search: str, seed: int, count: int = 8) -> list[Observation]:
    seen: list[Observation] = []
    while len(seen) < trials:
        settings = propose(space, seen, WEIGHTS, min(count, trials - len(seen)), search=search, seed=seed)
        if not settings:
            break
        seen += [landscape.measure(setting) for setting in settings]
    return seen


def test_an_unknown_search_is_refused():
    with pytest.raises(ValueError, match="unknown search 'grid': use one of xgb, random"):
        propose(SMALL, [], WEIGHTS, 8, search="grid")


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("space", [SMALL, UNEVEN], ids=["all", "some do not fit"])
def test_a_small_space_is_exhausted(space, search):
    """Every setting but the default once, whatever it gave, and then none."""
    for count in (5, 100):
        seen = tried(space, Landscape(space, 3), 1000, search, seed=count, count=count)
        everything = [key(setting) for setting in space.settings() if setting != space.default]
        assert sorted(key(o.setting) for o in seen) == sorted(everything)
        assert propose(space, seen, WEIGHTS, count, search=search) == []


@pytest.mark.parametrize("search", SEARCHES)
def test_a_space_without_choice_has_nothing_to_try(search):
    assert propose(Space(), [], WEIGHTS, 8, search=search) == []
    assert propose(Space((Knob("a", (1,), 1, ""),)), [], WEIGHTS, 8, search=search) == []


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("space", [WIDE, LARGE, ODD], ids=["1,296", "32,768", "half of 32,768"])
def test_nothing_is_tried_twice(space, search):
    seen = tried(space, Landscape(space, 5), 24, search, seed=1)
    keys = [key(o.setting) for o in seen]
    assert len(keys) == len(set(keys)) == 24
    assert key(space.default) not in keys
    assert all(space.complete(o.setting) == o.setting for o in seen)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("space", [WIDE, LARGE], ids=["1,296", "32,768"])
def test_the_same_arguments_give_the_same(space, search):
    seen = tried(space, Landscape(space, 5), 16, search, seed=1)
    first, again, other = (propose(space, seen, WEIGHTS, 8, search=search, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("search", SEARCHES)
def test_kernels_that_all_fail_are_no_reason_to_stop(search):
    seen = [Observation(setting, {}) for setting in list(WIDE.settings())[:50]]
    assert len(propose(WIDE, seen, WEIGHTS, 8, search=search)) == 8


def test_a_large_space_can_be_nearly_exhausted():
    """Most of it is seen: what is left is found all the same."""
    settings = [setting for setting in LARGE.settings() if setting != LARGE.default]
    seen = [Observation(setting, {}) for setting in settings[2000:]]
    proposed = propose(LARGE, seen, WEIGHTS, 8, search="random")
    assert len(proposed) == 8 and all(setting in settings[:2000] for setting in proposed)


def test_guided_rounds_keep_a_part_at_random():
    """Nothing is learned from gains that are all alike, and the model's favourites are not the whole round."""
    seen = tried(WIDE, Landscape(WIDE, 9), 24, "random", seed=4)
    guided = propose(WIDE, seen, WEIGHTS, 10, seed=4)
    at_random = propose(WIDE, seen, WEIGHTS, 10, search="random", seed=4)
    assert [key(s) for s in guided[8:]] == [key(s) for s in at_random if s not in guided[:8]][:2]


def test_the_first_rounds_are_random_until_there_is_enough_to_learn():
    seen = tried(WIDE, Landscape(WIDE, 9), 7, "random", seed=4)
    assert propose(WIDE, seen, WEIGHTS, 8, seed=4) == propose(WIDE, seen, WEIGHTS, 8, search="random", seed=4)


def best_of(search: str, seed: int) -> float:
    """The logarithm of the true gain of the best of 40 trials, as they were measured."""
    landscape = Landscape(WIDE, 100 + seed)
    seen = [o for o in tried(WIDE, landscape, 40, search, seed) if o.gains]
    best = max(seen, key=lambda o: sum(weight * math.log(o.gains[rows]) for rows, weight in WEIGHTS.items()))
    return math.log(landscape.total(best.setting))


def test_guided_search_finds_more_than_chance():
    """On 30 landscapes, of the same noise; the mean difference is about four standard errors."""
    differences = [best_of("xgb", seed) - best_of("random", seed) for seed in range(30)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    assert statistics.fmean(differences) > error > 0
