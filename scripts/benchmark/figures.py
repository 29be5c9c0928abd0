"""Figures from raw samples: ratios round by round, the best rival of a workload, means over the grid.

Works on the dictionaries of the JSON, so that a report can be made again without measuring.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from .contenders import OURS
from .strategies import PADDED
from .workloads import GRID

Record = dict[str, Any]


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


def ours(workload: Record) -> Record | None:
    return next((e for e in ran(workload) if e["contender"] == OURS), None)


def ran(workload: Record) -> list[Record]:
    return [e for e in workload["entries"] if "failed" not in e]


def rivals(workload: Record) -> list[Record]:
    return [e for e in ran(workload) if e["contender"] != OURS]


def seconds(entry: Record) -> float:
    """The median sample; the first measurement of an entry that was not repeated."""
    return statistics.median(entry["samples_s"] or [entry["first_s"]])


def ratio(theirs: Record, mine: Record) -> float:
    """The median over rounds of their time / ours; of the first measurements if one of them was not repeated."""
    if not (theirs["samples_s"] and mine["samples_s"]):
        return theirs["first_s"] / mine["first_s"]
    return statistics.median(a / b for a, b in zip(theirs["samples_s"], mine["samples_s"], strict=True))


def best_rival(workload: Record, contender: str | None = None, strategy: str | None = None) -> Best | None:
    """The rival's entry with the least median, among all or those of one contender or one strategy."""
    among = [e for e in rivals(workload) if contender in (None, e["contender"]) and strategy in (None, e["strategy"])]
    if not among:
        return None
    entry, mine = min(among, key=seconds), ours(workload)
    times = None if mine is None else ratio(entry, mine)
    return Best(entry["contender"], entry["strategy"], seconds(entry), times, bool(entry["samples_s"]))


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


def summary(result: Record) -> Record:
    """The figures that the JSON carries beside the raw samples."""
    overall = grid_mean(result)
    each = {name: grid_mean(result, name) for name in contenders(result)}
    return {
        "grid_best_rival": vars(overall) if overall else None,
        "grid_per_rival": {name: vars(mean) for name, mean in each.items() if mean},
        "workloads": {w["name"]: _of_workload(w) for w in result["workloads"]},
    }


def _of_workload(workload: Record) -> Record:
    mine, padded, best = ours(workload), best_rival(workload, strategy=PADDED), best_rival(workload)
    return {
        "ours_s": mine and seconds(mine),
        "gflops": gflops(workload),
        "best_padded": padded and vars(padded),
        "best_of_all": best and vars(best),
    }
