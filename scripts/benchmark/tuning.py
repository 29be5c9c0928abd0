"""A model by itself and as tuning logs have it: one process, in turn, every workload; and what compiling takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from . import in_turn, machine, models, pages
from .in_turn import head, over_the_grid, table, time_in_turn
from .results import described
from .workloads import all_workloads, select

COMPILES = 3


@dataclass(frozen=True)
class Settings:
    """What was asked on the command line."""

    command: str
    models: dict[str, dict[str, int]]
    precisions: tuple[str, ...]
    logs: Path
    threads: int
    seed: int
    seconds: float
    out: Path
    only: str | None = None


def run(settings: Settings, console: Console) -> None:
    """Measure every model and write its page as soon as it is measured."""
    report: dict[str, Any] = {
        **machine.measured_by(settings.command, settings.threads),
        "models": {},
    }
    for name, sizes in settings.models.items():
        module = models.build(sizes, settings.seed)
        for precision in settings.precisions:
            title = f"{name} {precision}"
            report["models"][title] = _measure(title, module, precision, settings, console)
            pages.publish(PAGE, report, settings.out / "tuned.json", console)


def _measure(title: str, module: Any, precision: str, settings: Settings, console: Console) -> dict[str, Any]:
    compile_s: dict[str, list[float]] = {"default": [], "tuned": []}
    built: dict[str, Any] = {}
    for _ in range(COMPILES):
        for way, logs in (("default", False), ("tuned", settings.logs)):
            console.print(f"{title}: compiling, {way}")
            start = time.perf_counter()
            built[way] = _compile(module, precision, logs, settings.threads)
            compile_s[way].append(time.perf_counter() - start)
    tuned = {kernel.name: len(kernel.variants) for kernel in built["tuned"].manifest.kernels if kernel.variants}
    measured = []
    for workload in select(all_workloads(settings.seed), settings.only, quick=False):
        measured.append(time_in_turn(built, workload, settings.seed, settings.seconds))
        console.print(f"{title}: {workload.label}: {in_turn.gain(in_turn.summarized(measured[-1])):.3f}x")
    return {"compile_s": compile_s, "variants": tuned, "workloads": measured}


def _compile(module: Any, precision: str, logs: Path | bool, threads: int) -> Any:
    import turbo_tvm

    return turbo_tvm.compile(module, precision=precision, logs=logs, threads=threads, progress=False)


def summarized(report: dict[str, Any]) -> dict[str, Any]:
    """Return medians and gains in place of samples."""
    return {**report, "models": {title: _summarized(found) for title, found in report["models"].items()}}


def _summarized(found: dict[str, Any]) -> dict[str, Any]:
    compile_s = {way: described(samples) for way, samples in found["compile_s"].items()}
    return {**found, "compile_s": compile_s, "workloads": [in_turn.summarized(one) for one in found["workloads"]]}


def markdown(report: dict[str, Any], name: str = "tuned") -> str:
    """The page of a summary."""
    lines = [
        *head("Default and tuned", report),
        "The same model compiled twice, without logs and with them, run in turn in one process. Times are medians; a",
        "gain (x) is the median of the round-by-round ratios of the default's time to the tuned model's.",
    ]
    for title, found in report["models"].items():
        lines += ["", f"## {title}", "", *_summary(found), "", *table(found["workloads"])]
    return "\n".join(lines) + "\n"


def _summary(found: dict[str, Any]) -> list[str]:
    compiles = {way: took["median"] for way, took in found["compile_s"].items()}
    more = compiles["tuned"] - compiles["default"]
    return [
        *over_the_grid(found["workloads"]),
        f"- compile: {compiles['default']:.1f} s, with logs {compiles['tuned']:.1f} s ({more:+.1f} s)",
        f"- tuned kernels, and their variants: {found['variants'] or 'none'}",
    ]


PAGE = pages.Page("tuning", summarized, markdown)
