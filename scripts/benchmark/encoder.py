"""The encoder benchmark: models x precisions x workloads, results kept after every workload."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from turbo_tvm.profiling.machine_limits import machine_limits

from . import contenders, figures, machine, models, pages, report
from .encoder_results import Results
from .measure import Limits, measure
from .report import DISTURBED_CPUS
from .workloads import Workload, all_workloads, select

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What was asked on the command line."""

    command: str
    models: dict[str, dict[str, int]]
    precisions: tuple[str, ...]
    threads: int
    seed: int
    out: Path
    limits: Limits
    only: str | None = None
    quick: bool = False
    resume: bool = False
    rivals: tuple[str, ...] | None = None


@dataclass
class Plan:
    """One JSON and the workloads it still wants."""

    model: str
    precision: str
    results: Results
    workloads: list[Workload]


def run(settings: Settings, console: Console) -> None:
    """Measure everything asked, and render it."""
    plans = [_plan(settings, model, p, console) for model in settings.models for p in settings.precisions]
    total = sum(_cost(settings, plan, w) for plan in plans for w in plan.workloads)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeLeft(), console=console, speed_estimate_period=7200) as progress:
        task = progress.add_task("starting", total=total)
        for model in settings.models:
            _measure_model(settings, [p for p in plans if p.model == model and p.workloads], progress, task)
    for plan in plans:
        pages.publish(report.PAGE, plan.results.data, plan.results.path, console)


def _plan(settings: Settings, model: str, precision: str, console: Console) -> Plan:
    header = {
        "model": model,
        "precision": precision,
        "seed": settings.seed,
        "sizes": settings.models[model],
        "machine": machine.describe(settings.threads),
    }
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    this = {"command": settings.command, "started": started, "revision": machine.revision()}
    results = Results(settings.out / f"{model}-{precision}.json", header, this | {"limits": vars(settings.limits)})
    if results.differences:
        different = ", ".join(results.differences)
        console.print(f"{results.path}: measured with another {different}; starting afresh")
    wanted = select(all_workloads(settings.seed), settings.only, settings.quick)
    missing = [w for w in wanted if not (settings.resume and results.has(w.name))]
    if len(missing) < len(wanted):
        console.print(f"{results.path}: {len(wanted) - len(missing)} of {len(wanted)} workloads are there already")
    return Plan(model, precision, results, missing)


def _measure_model(settings: Settings, plans: list[Plan], progress: Progress, task: TaskID) -> None:
    if not plans:
        return
    progress.update(task, description=f"{plans[0].model}: making the model")
    model = models.build(settings.models[plans[0].model], settings.seed)
    for plan in plans:
        title = f"{plan.model} {plan.precision}"
        announce = partial(_announce, progress, task, title)
        field = contenders.gather(model, settings.threads, plan.precision, settings.rivals, announce)
        for name, why in field.absent.items():
            progress.console.print(f"{title}: {name} is absent: {why}")
        plan.results.contenders(field.details, field.absent)
        progress.update(task, description=f"{title}: measuring the machine's limits")
        plan.results.data["limits"] = _limits(settings.threads, progress.console)
        for workload in plan.workloads if field.built else []:
            progress.update(task, description=f"{title}: {workload.label}")
            record = _measure(settings, plan, field, workload)
            plan.results.add(record)
            progress.console.print(f"{title}: {_line(record)}")
            progress.advance(task, _cost(settings, plan, workload))
        field.close()
    del model
    gc.collect()


def _limits(threads: int, console: Console) -> dict[str, Any]:
    """What the machine can do at best in the same hour: FLOP/s and bytes/s."""
    found = machine_limits(threads, remeasure=True, notice=console.print, step=lambda _: None)
    return asdict(found)


def _announce(progress: Progress, task: TaskID, title: str, contender: str) -> None:
    progress.update(task, description=f"{title}: building {contender}")


def _measure(settings: Settings, plan: Plan, field: contenders.Field, workload: Workload) -> dict[str, Any]:
    load, others = machine.load_average(), machine.cpus_used_by_others()
    entries = field.entries(workload, settings.seed)
    rounds = measure(entries, settings.limits, contenders.reason)
    record = {
        "name": workload.name,
        "label": workload.label,
        "kind": workload.kind,
        "lengths": list(workload.lengths),
        "tokens": workload.tokens,
        "flops": models.needed_flops(settings.models[plan.model], workload.lengths),
        "rounds": rounds,
        "load_average": load,
        "cpus_used_by_others": others,
        "entries": [entry.record() for entry in entries],
    }
    rate, peak = figures.gflops(figures.summarized_workload(record)), figures.peak(plan.results.data, plan.precision)
    return record | {"fraction_of_peak": rate / peak if rate and peak else None}


def _line(raw: dict[str, Any]) -> str:
    record = figures.summarized_workload(raw)
    mine, best, rate = figures.ours(record), figures.best_rival(record), figures.gflops(record)
    parts = [record["label"], f"{record['rounds']} rounds"]
    if mine is not None:
        parts.append(f"ours {figures.seconds(mine) * 1e3:.4g} ms, {rate:.0f} GFLOP/s of needed work")
    if best is not None:
        ratio = "" if best.ratio is None else f" ({best.ratio:.2f}x)"
        parts.append(f"best rival {best.contender}, {best.strategy}: {best.seconds * 1e3:.4g} ms{ratio}")
    if record["cpus_used_by_others"] > DISTURBED_CPUS:
        parts.append(f"DISTURBED: other processes used {record['cpus_used_by_others']} CPUs")
    return "; ".join(parts)


def _cost(settings: Settings, plan: Plan, workload: Workload) -> float:
    return models.relative_cost(settings.models[plan.model], workload.lengths)
