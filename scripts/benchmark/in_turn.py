"""Two models on the same workloads, one after the other, round by round; and what is said of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from .measure import rotated
from .report import markdown_row
from .results import Record, described, pairwise
from .workloads import GRID, Workload

LEAST_ROUNDS = 5


def time_in_turn(models: Mapping[str, Any], workload: Workload, seed: int, seconds: float) -> dict[str, Any]:
    """Rounds of all, the order alternating, for so many seconds and at least a few; a short call is repeated."""
    names = list(models)
    sequences = workload.sequences(seed, models[names[0]].manifest.request_limits.vocab_size)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for model in models.values():
        model.run(sequences)
    start = time.perf_counter()
    models[names[0]].run(sequences)
    calls = max(1, math.ceil(0.01 / (time.perf_counter() - start)))
    begun, number = time.perf_counter(), 0
    while number < LEAST_ROUNDS or time.perf_counter() - begun < seconds:
        for name in rotated(names, number):
            start = time.perf_counter()
            for _ in range(calls):
                models[name].run(sequences)
            samples[name].append((time.perf_counter() - start) / calls)
        number += 1
    return {"name": workload.name, "label": workload.label, "kind": workload.kind, "samples_s": samples}


def summarized(record: Record) -> Record:
    """Return a workload with medians, quartiles and the gain in place of its samples.

    The gain is the median of the round-by-round ratios of the first one's time to the second's.
    """
    first, second = record["samples_s"].values()
    made = {key: value for key, value in record.items() if key != "samples_s"}
    made["seconds"] = {name: described(samples) for name, samples in record["samples_s"].items()}
    return made | {"gain": pairwise(first, second)}


def gain(summary: Mapping[str, Any]) -> float:
    """How much faster the second one is."""
    return summary["gain"]["median"]


def head(title: str, report: Mapping[str, Any]) -> list[str]:
    """The first lines of a page: what was measured, where, and by which command."""
    here = report["machine"]
    return [
        f"# {title}",
        "",
        f"{here['cpu']}, {here['threads']} threads, TVM {here['packages']['apache-tvm']}.",
        "",
        f"    {report['command']}    # {report['started']}, revision {report['revision']}",
        "",
    ]


def over_the_grid(workloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of a list: the geometric mean of the gains over the grid; none where the grid was left out."""
    grid = [gain(one) for one in workloads if one["kind"] == GRID]
    if not grid:
        return []
    return [f"- grid: geometric mean **{geometric_mean(grid):.3f}x**, least {min(grid):.3f}x, {len(grid)} points"]


def table(workloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Medians and gains by workload."""
    names = list(workloads[0]["seconds"]) if workloads else []
    rows = [markdown_row(["requests", *names, "gain"]), markdown_row(["---"] * (2 + len(names)))]
    for one in workloads:
        times = [f"{1e3 * found['median']:.4g} ms" for found in one["seconds"].values()]
        rows.append(markdown_row([one["label"], *times, f"{gain(one):.3f}x"]))
    return rows
