"""Searches beside one another: kernels as several directories of logs have them, each timed in turn with the first."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.console import Console

from . import machine, pages
from .plots import new_figure, save
from .report import markdown_row

SECONDS = 0.7  # per kernel, bucket and directory


@dataclass(frozen=True)
class Settings:
    """What was asked on the command line. logs: the reference, and those that are compared with it."""

    command: str
    artifacts: tuple[Path, ...]
    logs: tuple[Path, ...]
    kernels: tuple[str, ...]
    threads: int
    out: Path


def run(settings: Settings, console: Console) -> None:
    """Measure every kernel that all of the logs have, and write the page."""
    report: dict[str, Any] = {
        **machine.measured_by(settings.command, settings.threads),
        "reference": str(settings.logs[0]),
        "kernels": [],
        "curves": [],
    }
    for path in settings.artifacts:
        _measure(path, settings, report, console)
    pages.publish(PAGE, report, settings.out / "searches.json", console)


def _measure(path: Path, settings: Settings, report: dict[str, Any], console: Console) -> None:
    from turbo_tvm.tuning.candidate import Effort
    from turbo_tvm.tuning.report import build, curves, in_turn, variants_of
    from turbo_tvm.tuning.tune import job
    from turbo_tvm.tuning.tuner import task_record
    from turbo_tvm.tuning.workers import Workers

    jobs = {str(logs): job(path, logs=logs, kernels=settings.kernels) for logs in settings.logs}
    first, *others = jobs
    it = jobs[first]
    for name, one in jobs.items():
        for curve in curves(it.tasks, one.log, it.target):
            report["curves"].append(
                {"logs": name, "kernel": curve.kernel, "search": curve.search, "best": list(curve.best)}
            )
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_searches_") as directory, Workers(2, 300.0) as workers:
        for task in it.tasks:
            known = {name: one.log.read(task_record(task, it.target)) for name, one in jobs.items()}
            if any(log.result is None for log in known.values()):
                continue
            libraries = {name: f"{directory}/{task.kernel}_{i}.so" for i, name in enumerate(jobs)}
            build(task, {libraries[name]: variants_of(known[name]) for name in jobs}, it.target, workers)
            effort = Effort(SECONDS, settings.threads)
            for name in others:
                seconds = in_turn(task, libraries[first], libraries[name], it.buckets, effort, workers)
                weights = {b.rows: b.weight for b in it.buckets}
                last = known[name].trials[-1]
                found: dict[str, Any] = {"kernel": task.kernel, "logs": name, "search": last.search, "seed": last.seed}
                found |= {"trials": len(known[name].trials), "weights": weights, "seconds": seconds}
                report["kernels"].append(found)
                console.print(f"{task.kernel}: {name}: {speed(found):.3f} of {first}")


def speed(one: Mapping[str, Any]) -> float:
    """Return a kernel's speed as a part of the reference's: the geometric mean over the buckets by their weights."""
    from turbo_tvm.tuning.candidate import gains

    found = gains({int(rows): pairs for rows, pairs in one["seconds"].items()})
    weights = {int(rows): weight for rows, weight in one["weights"].items() if weight}
    return math.exp(sum(w * math.log(found[rows]) for rows, w in weights.items()) / sum(weights.values()))


def summarized(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a speed for every kernel in place of the samples."""
    kernels = []
    for one in report["kernels"]:
        made = {key: value for key, value in one.items() if key != "seconds"}
        kernels.append({**made, "pairs": {rows: len(pairs) for rows, pairs in one["seconds"].items()}})
        kernels[-1]["speed"] = speed(one)
    return {**report, "kernels": kernels}


def markdown(report: Mapping[str, Any], name: str = "searches") -> str:
    """The page of a summary."""
    here = report["machine"]
    names = list(dict.fromkeys(one["logs"] for one in report["kernels"]))
    lines = [
        "# Searches",
        "",
        f"{here['cpu']}, {here['threads']} threads, TVM {here['packages']['apache-tvm']}.",
        "",
        f"    {report['command']}    # {report['started']}, revision {report['revision']}",
        "",
        f"Each kernel as a search left it, timed in turn with that of `{report['reference']}`: speed as a part of it,",
        "the geometric mean over the buckets by their weights; of each bucket the lesser of the pairs' median and best",
        "over best.",
        "",
    ]
    found = {(one["kernel"], one["logs"]): one for one in report["kernels"]}
    kernels = list(dict.fromkeys(kernel for kernel, _ in found))
    heads = [f"{name}: {_how(next(one for one in report['kernels'] if one['logs'] == name))}" for name in names]
    lines += [markdown_row(["kernel", *heads]), markdown_row(["---"] * (1 + len(names)))]
    for kernel in kernels:
        cells = [f"{found[kernel, name]['speed']:.3f}" if (kernel, name) in found else "" for name in names]
        lines.append(markdown_row([f"`{kernel}`", *cells]))
    if kernels:
        means = [geometric_mean(one["speed"] for one in report["kernels"] if one["logs"] == name) for name in names]
        least = [min(one["speed"] for one in report["kernels"] if one["logs"] == name) for name in names]
        lines.append(markdown_row(["**geometric mean**", *(f"**{mean:.3f}**" for mean in means)]))
        lines.append(markdown_row(["least", *(f"{value:.3f}" for value in least)]))
    return "\n".join(lines) + "\n"


def _how(one: Mapping[str, Any]) -> str:
    return f"{one['search']}, seed {one['seed']}, {one['trials']} trials"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Best so far against trials: the mean over the kernels of each directory, as the trials saw it.

    Raises PlotsAbsent.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for number, (logs, search) in enumerate(dict.fromkeys((c["logs"], c["search"]) for c in report["curves"])):
        mine = [c["best"] for c in report["curves"] if (c["logs"], c["search"]) == (logs, search)]
        for best in mine:
            axes.step(range(1, len(best) + 1), best, where="post", color=f"C{number}", alpha=0.2, linewidth=1)
        mean = [geometric_mean(each) for each in _columns(mine)]
        label = f"{search}, {logs}: {len(mine)} kernels, geometric mean"
        axes.step(range(1, len(mean) + 1), mean, where="post", color=f"C{number}", linewidth=2.5, label=label)
    axes.set(xlabel="trials", ylabel="best so far / default", title="Searches, as their trials saw them")
    axes.grid(True, alpha=0.2)
    axes.legend(loc="lower right")
    save(figure, path)


def _columns(rows: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Trial by trial; a search that ended early, for it had tried everything, keeps its last."""
    longest = max(map(len, rows))
    return list(zip(*([*row, *[row[-1]] * (longest - len(row))] for row in rows), strict=True))


PAGE = pages.Page("searches", summarized, markdown, draw)
