"""From trials to variants: which settings are timed again in the final, and which a kernel is built in.

Pure functions. A trial's time is a small sample, and the best of many small samples is partly luck: the best few are
timed again beside the default, and only settings that still gain are chosen. A variant costs code and compile time, so
a setting that is nearly as good for a neighbouring bucket serves it too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turbo_tvm.tuning.search import Observation, key

LEAST_GAIN = 1.01  # a smaller gain is noise, or not worth a variant

VARIANT_COST = 1.05  # what a further variant must gain on the mean over the buckets: it takes a second to compile

_FINALISTS = 2  # of each bucket


@dataclass(frozen=True)
class Choice:
    """A setting for batches of up to `max_rows` rows, None for any; {} is the default."""

    setting: dict[str, int]
    max_rows: int | None


def finalists(seen: Sequence[Observation], weights: Mapping[int, float]) -> list[dict[str, int]]:
    """Return the settings to time again: the fastest few of each bucket, and of all buckets together."""
    good = [o for o in seen if o.gains]
    chosen: dict[tuple, dict[str, int]] = {}
    for rows in weights:
        here = [o for o in good if o.gains.get(rows, 0.0) >= LEAST_GAIN]
        for o in sorted(here, key=lambda o: -o.gains[rows])[:_FINALISTS]:
            chosen[key(o.setting)] = dict(o.setting)
    whole = [o for o in good if all(rows in o.gains for rows in weights)]
    for o in sorted(whole, key=lambda o: -mean_gain(o.gains, weights))[:_FINALISTS]:
        if mean_gain(o.gains, weights) > 1:
            chosen[key(o.setting)] = dict(o.setting)
    return list(chosen.values())


def mean_gain(gains: Mapping[int, float], weights: Mapping[int, float]) -> float:
    """Return the weighted geometric mean of the gains over the buckets."""
    total = sum(weights.values())
    return math.exp(sum(weight * math.log(gains[rows]) for rows, weight in weights.items()) / total)


def variants(
    final: Sequence[Observation], bounds: Mapping[int, int | None], most: int = 2
) -> tuple[list[Choice], dict[int, float]]:
    """Return the variants of a kernel, and the gain of each bucket with its own.

    final: the finalists, timed again.
    bounds: the largest batch of each bucket, by the rows it was measured at.
    most: how many settings may be used, the default included if it is one; each beyond the first must gain its cost.

    No bucket loses, and where less than `LEAST_GAIN` is gained on the mean the default stays.
    """
    rows = list(bounds)
    default = Observation({}, dict.fromkeys(rows, 1.0))
    sets = [some for count in range(1, most + 1) for some in itertools.combinations([default, *final], count)]
    used = max((some for some in sets if _worth(some, rows) is not None), key=lambda some: _worth(some, rows) or 0.0)
    if (_worth(used, rows) or 0.0) < math.log(LEAST_GAIN):
        used = (default,)
    picked = {r: max(used, key=lambda o: o.gains.get(r, 0.0)) for r in rows}
    choices: list[Choice] = []
    for r in rows:
        choice = Choice(dict(picked[r].setting), bounds[r])
        if choices and choices[-1].setting == choice.setting:
            choices.pop()
        choices.append(choice)
    return choices, {r: picked[r].gains[r] for r in rows}


def one_for_all(
    final: Sequence[Observation], bounds: Mapping[int, int | None], weights: Mapping[int, float]
) -> tuple[list[Choice], dict[int, float]]:
    """Choose as `variants` does for a kernel that has one setting for all rows, as on a GPU."""
    default = Observation({}, dict.fromkeys(bounds, 1.0))
    whole = [o for o in final if set(o.gains) >= set(bounds) and mean_gain(o.gains, weights) >= LEAST_GAIN]
    best = max([default, *whole], key=lambda o: mean_gain(o.gains, weights))
    return [Choice(dict(best.setting), None)], {rows: best.gains[rows] for rows in bounds}


def _worth(used: Sequence[Observation], rows: Sequence[int]) -> float | None:
    """Return the mean logarithm of the buckets' gains, each by its best setting, less the cost of the variants.

    None if a bucket loses.
    """
    best = [max(o.gains.get(r, 0.0) for o in used) for r in rows]
    if min(best) < 1.0:
        return None
    return sum(map(math.log, best)) / len(rows) - math.log(VARIANT_COST) * (len(used) - 1)
