"""Figures of the encoder benchmark: ratios round by round, the best rival of a workload, means over the grid.

`summarized` makes a summary of raw samples; everything else works on the dictionaries of a summary, so that a page can
be made again without measuring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .contenders import OURS
from .results import Record, described, pairwise
from .strategies import PADDED
from .workloads import GRID


@dataclass(frozen=True)
class Best:
    """The fastest of some rivals on a workload. ratio: its time / ours, None where ours is absent."""

    contender: str
    strategy: str
    seconds: float
    ratio: float | None
    repeated: bool


@dataclass(frozen=True)
class Mean:
    """Ratios over the grid: their geometric mean, the least and where, and how many points there are."""

    mean: float
    least: float
    point: str
    points: int


def summarized(raw: Record) -> Record:
    """Return the summary of a model's raw samples."""
    made = {**raw, "workloads": [summarized_workload(w) for w in raw["workloads"]]}
    overall = grid_mean(made)
    each = {name: grid_mean(made, name) for name in contenders(made)}
    made["summary"] = {
        "grid_best_rival": vars(overall) if overall else None,
        "grid_per_rival": {name: vars(mean) for name, mean in each.items() if mean},
    }
    return made


def summarized_workload(workload: Record) -> Record:
    """Return a workload with a median, quartiles and the ratio to ours in place of every entry's samples."""
    mine = ours(workload)
    return {**workload, "entries": [_summarized_entry(e, mine) for e in workload["entries"]]}


def _summarized_entry(entry: Record, mine: Record | None) -> Record:
    if "failed" in entry:
        return entry
    made = {key: value for key, value in entry.items() if key not in ("samples_s", "first_s")}
    made["seconds"] = described(entry["samples_s"] or [entry["first_s"]])
    if mine is None or entry is mine:
        return made
    return made | {"ratio": ratio(entry, mine)}


def ours(workload: Record) -> Record | None:
    return next((e for e in ran(workload) if e["contender"] == OURS), None)


def ran(workload: Record) -> list[Record]:
    return [e for e in workload["entries"] if "failed" not in e]


def rivals(workload: Record) -> list[Record]:
    return [e for e in ran(workload) if e["contender"] != OURS]


def seconds(entry: Record) -> float:
    """The median sample; the first measurement of an entry that was not repeated."""
    return entry["seconds"]["median"]


def ratio(theirs: Record, mine: Record) -> Record:
    """Of raw entries, the rounds' ratios of their time to ours; of the first calls if one was not repeated."""
    if not (theirs["samples_s"] and mine["samples_s"]):
        return described([theirs["first_s"] / mine["first_s"]])
    return pairwise(theirs["samples_s"], mine["samples_s"])


def best_rival(workload: Record, contender: str | None = None, strategy: str | None = None) -> Best | None:
    """The rival's entry with the least median, among all or those of one contender or one strategy."""
    among = [e for e in rivals(workload) if contender in (None, e["contender"]) and strategy in (None, e["strategy"])]
    if not among:
        return None
    entry = min(among, key=seconds)
    times = entry["ratio"]["median"] if "ratio" in entry else None
    return Best(entry["contender"], entry["strategy"], seconds(entry), times, "not_repeated" not in entry)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def grid(result: Record) -> list[Record]:
    return [w for w in result["workloads"] if w["kind"] == GRID]


def grid_mean(result: Record, contender: str | None = None) -> Mean | None:
    """Best rival / ours over the grid, or one rival / ours over the points that it ran."""
    points = [(w["label"], best_rival(w, contender, PADDED)) for w in grid(result)]
    ratios = [(label, best.ratio) for label, best in points if best is not None and best.ratio is not None]
    if not ratios:
        return None
    label, least = min(ratios, key=lambda pair: pair[1])
    return Mean(geometric_mean([r for _, r in ratios]), least, label, len(ratios))


def contenders(result: Record) -> list[str]:
    """Rivals that ran anywhere, in the order of the results."""
    names = dict.fromkeys(e["contender"] for w in result["workloads"] for e in rivals(w))
    return list(names)


def gflops(workload: Record) -> float | None:
    """GFLOP/s of needed work by ours."""
    mine = ours(workload)
    return None if mine is None else workload["flops"] / seconds(mine) * 1e-9


def peak(result: Record, precision: str) -> float | None:
    """The machine's measured GFLOP/s in a precision."""
    limits = result.get("limits") or {}
    flops = limits.get("bf16_flops" if precision == "bf16" else "fp32_flops")
    return flops * 1e-9 if flops else None
