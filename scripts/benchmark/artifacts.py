"""Two artifacts of one model, such as an older version's and a newer one's: one process, in turn, every workload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from . import in_turn, machine, pages
from .workloads import all_workloads, select


@dataclass(frozen=True)
class Settings:
    """What was asked on the command line. names: of the two, in the report."""

    command: str
    artifacts: tuple[Path, ...]
    names: tuple[str, ...]
    threads: int
    seed: int
    seconds: float
    out: Path
    only: str | None = None


def run(settings: Settings, console: Console) -> None:
    """Measure, keep every workload as soon as it is measured, and write the page."""
    import turbo_tvm

    models = {
        name: turbo_tvm.load(path, threads=settings.threads)
        for name, path in zip(settings.names, settings.artifacts, strict=True)
    }
    first, second = (model.manifest for model in models.values())
    _check(first, second)
    report: dict[str, Any] = {
        **machine.measured_by(settings.command, settings.threads),
        "model": f"{second.name} {second.precision}",
        "workloads": [],
    }
    for workload in select(all_workloads(settings.seed), settings.only, quick=False):
        found = in_turn.time_in_turn(models, workload, settings.seed, settings.seconds)
        report["workloads"].append(found)
        console.print(f"{workload.label}: {in_turn.gain(in_turn.summarized(found)):.3f}x")
        pages.keep(PAGE, report, settings.out / "artifacts.json")
    pages.publish(PAGE, report, settings.out / "artifacts.json", console)


def _check(first: Any, second: Any) -> None:
    """SystemExit for models that cannot be compared: their answers would differ, not only their speed."""
    for what in ("inputs", "outputs", "request_limits"):
        if getattr(first, what) != getattr(second, what):
            raise SystemExit(f"error: the artifacts differ in their {what}: compare two of the same model")


def summarized(report: dict[str, Any]) -> dict[str, Any]:
    """Return medians and gains in place of samples."""
    return {**report, "workloads": [in_turn.summarized(one) for one in report["workloads"]]}


def markdown(report: dict[str, Any], name: str = "artifacts") -> str:
    """The page of a summary."""
    lines = [
        *in_turn.head(f"Two artifacts: {report['model']}", report),
        "Both run in turn in one process. Times are medians; a gain (x) is the median of the round-by-round ratios of",
        "the first one's time to the second's.",
        "",
        *in_turn.over_the_grid(report["workloads"]),
        "",
        *in_turn.table(report["workloads"]),
    ]
    return "\n".join(lines) + "\n"


PAGE = pages.Page("artifacts", summarized, markdown)
