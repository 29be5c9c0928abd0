"""The search: which settings to try next, guided by a cost model that is learned on the way, or at random.

Pure functions over what was measured so far. The model is XGBoost's trees over the knobs' values and the size of the
batch, and it predicts the gain over the default; a setting is worth its expected improvement on the best known one,
summed over the buckets by their weights. A part of every round is random, so that the model sees the rest of the space.
Method: Chen et al., "Learning to Optimize Tensor Programs" (arXiv 1805.08166).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from turbo_tvm.schedules.common.space import Space

SEARCHES = ("xgb", "random")
_RANDOM_SHARE = 0.2  # the random part of a guided round
_LEAST_TO_LEARN = 8  # observations; with fewer the search is random
_MOST_SETTINGS = 4096  # that are ranked; larger spaces are sampled
_TREES = {"n_estimators": 80, "max_depth": 4, "learning_rate": 0.15, "subsample": 0.8, "n_jobs": 1, "verbosity": 0}


@dataclass(frozen=True)
class Observation:
    """A setting that was tried."""

    setting: Mapping[str, int]  # the value of each knob by its name
    gains: Mapping[int, float]  # default's time / its own, by the rows of the bucket; empty for one that failed


def propose(
    space: Space,
    seen: Sequence[Observation],
    weights: Mapping[int, float],
    count: int,
    *,
    search: str = "xgb",
    seed: int = 0,
) -> list[dict[str, int]]:
    """Return up to `count` settings that were not seen, best first; none where all were. Deterministic.

    weights: of each bucket, by its rows. search: one of SEARCHES; ValueError for another.
    """
    if search not in SEARCHES:
        raise ValueError(f"unknown search {search!r}: use one of {', '.join(SEARCHES)}")
    rng = np.random.default_rng((seed, len(seen)))
    known = {key(o.setting) for o in seen} | {key(space.default)}
    left = _unseen(space, known, rng)
    drawn = [left[i] for i in rng.permutation(len(left))[:count]]
    good = [o for o in seen if o.gains]
    if search == "random" or len(good) < _LEAST_TO_LEARN or len(left) <= count:
        return drawn
    values = _expected_improvement(space, good, weights, left, seed)
    ranked = [left[i] for i in np.argsort(-values, kind="stable")]
    guided = ranked[: count - math.ceil(count * _RANDOM_SHARE)]
    names = {key(setting) for setting in guided}
    return [*guided, *(setting for setting in drawn if key(setting) not in names)][:count]


def key(setting: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Return the setting in a hashable form."""
    return tuple(sorted(setting.items()))


def _unseen(space: Space, known: set, rng: np.random.Generator) -> list[dict[str, int]]:
    if space.most <= _MOST_SETTINGS:
        return [setting for setting in space.settings() if key(setting) not in known]
    found: dict[tuple, dict[str, int]] = {}
    for _ in range(4 * _MOST_SETTINGS):
        setting = {knob.name: int(rng.choice(knob.values)) for knob in space.knobs}
        if space.valid(setting) and key(setting) not in known:
            found[key(setting)] = setting
        if len(found) == _MOST_SETTINGS:
            break
    return list(found.values())


def _expected_improvement(
    space: Space,
    good: Sequence[Observation],
    weights: Mapping[int, float],
    left: Sequence[Mapping[str, int]],
    seed: int,
) -> np.ndarray:
    from xgboost import XGBRegressor

    rows = [[*space.features(o.setting), math.log2(size)] for o in good for size in o.gains]
    logs = [math.log(gain) for o in good for gain in o.gains.values()]
    model = XGBRegressor(**_TREES, random_state=seed).fit(np.array(rows), np.array(logs))
    features = np.array([space.features(setting) for setting in left])
    total = np.zeros(len(left))
    for size, weight in weights.items():
        known = [math.log(o.gains[size]) for o in good if size in o.gains]
        best = max([0.0, *known])  # the default is known to gain nothing
        predicted = model.predict(np.column_stack([features, np.full(len(left), math.log2(size))]))
        total += weight * (np.maximum(predicted - best, 0) + 1e-3 * predicted)  # the second orders those that lose
    return total
