"""From trials to variants: who goes to the final, and which settings a kernel is built in.

Pure functions. A trial's time is a small sample, and the best of many small samples is partly luck: the best few are
timed again beside the default, and only what holds then is chosen. A variant costs code and compile time, so a setting
that is nearly as good for a neighbour's batches serves them too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turbo_tvm.tuning.search import Observation, key

LEAST_GAIN = 1.01  # below that it is noise, or not worth code of its own

_FINALISTS = 3  # of each bucket


@dataclass(frozen=True)
class Choice:
    """A setting for batches of up to `max_rows` rows, None for any; {} is the default."""

    setting: dict[str, int]
    max_rows: int | None


def finalists(seen: Sequence[Observation], weights: Mapping[int, float]) -> list[dict[str, int]]:
    """The settings that are worth a second look: the fastest few of each bucket, and of all together."""
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
    """The geometric mean over the buckets, by their weights."""
    total = sum(weights.values())
    return math.exp(sum(weight * math.log(gains[rows]) for rows, weight in weights.items()) / total)


def variants(
    final: Sequence[Observation], bounds: Mapping[int, int | None], most: int = 2
) -> tuple[list[Choice], dict[int, float]]:
    """The variants of a kernel, and what each bucket gains by its own.

    final: the finalists, timed again. bounds: the buckets' largest batches, by the rows they were measured at. At most
    `most` settings beside the default are used: those that gain most together.
    """
    rows = list(bounds)
    used = [Observation({}, dict.fromkeys(rows, 1.0))]
    for count in range(1, most + 1):
        sets = [[*used[:1], *some] for some in itertools.combinations(final, count)]
        best = max(sets, key=lambda some: _worth_together(some, rows), default=used)
        if _worth_together(best, rows) < _worth_together(used, rows) + math.log(LEAST_GAIN):
            break
        used = best
    picked = {r: max(used, key=lambda o: _worth(o, r)) for r in rows}
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
    """The same for a kernel that has one setting for all rows, as on a GPU."""
    default = Observation({}, dict.fromkeys(bounds, 1.0))
    whole = [o for o in final if set(o.gains) >= set(bounds) and mean_gain(o.gains, weights) >= LEAST_GAIN]
    best = max([default, *whole], key=lambda o: mean_gain(o.gains, weights))
    return [Choice(dict(best.setting), None)], {rows: best.gains[rows] for rows in bounds}


def _worth_together(used: Sequence[Observation], rows: Sequence[int]) -> float:
    """The logarithms of what the buckets gain, each by the best of these settings."""
    return sum(math.log(max(_worth(o, r) for o in used)) for r in rows)


def _worth(o: Observation, rows: int) -> float:
    gain = o.gains.get(rows, 0.0)
    return gain if gain >= LEAST_GAIN or not o.setting else 0.0
