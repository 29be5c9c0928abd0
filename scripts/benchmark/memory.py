"""What memory costs between kernels: every strategy of the planner on streams of requests, and what engines really
take.

Two parts. Planned: the arena that serves models handles each trace, without running kernels: bytes held, allocated and
freed, and the time of planning. Measured: the resident memory of a process that answers the first requests of the same
trace, beyond what it had after a first request of one token; a process per engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from . import machine, models
from .memory_child import ENGINES
from .onnx_files import OnnxFiles
from .report import markdown_row
from .results import write_json
from .traces import traces

MB = 1e6
DEEP = {"hidden_size": 64, "num_hidden_layers": 48, "num_attention_heads": 4, "intermediate_size": 256}
SHAPES = 200  # distinct ones, for the time of planning


@dataclass(frozen=True)
class Settings:
    """What is asked. command: as it was typed; measured: requests per trace and engine, 0 for none."""

    command: str
    model: str
    sizes: dict[str, int]
    measured: int
    threads: int
    seed: int
    out: Path


def run(settings: Settings, console: Console) -> None:
    """Plan and measure all traces, and write `memory.json`, `memory.md` and `memory.png`."""
    import turbo_tvm

    streams, threads = traces(settings.seed), settings.threads
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_bench_") as directory:
        console.print(f"compiling {settings.model}")
        model = models.build(settings.sizes, settings.seed)
        compiled = turbo_tvm.compile(model, threads=threads, name=settings.model, progress=False)
        compiled.save(Path(directory) / "model.turbo")
        deep = turbo_tvm.compile(models.build(DEEP, settings.seed), threads=threads, name="deep", progress=False)
        times = {m.manifest.name: planning_times(m.manifest) for m in (compiled, deep)}
        planned = {name: planned_trace(compiled.manifest, lengths, console, name) for name, lengths in streams.items()}
        console.print(table(PLANNED_COLUMNS, all_rows(planned, planned_rows)))
        console.print(table(TIME_COLUMNS, time_rows(times)))
        measured = {}
        if settings.measured:
            OnnxFiles(model, Path(directory)).exported("sdpa")
            model.save_pretrained(Path(directory) / "model")
            measured = measure_all(streams, settings.measured, Path(directory), threads, console)
            console.print(table(MEASURED_COLUMNS, all_rows(measured, measured_rows)))
    report = {
        "model": settings.model,
        "seed": settings.seed,
        **machine.measured_by(settings.command, threads),
        "traces": streams,
        "planned": planned,
        "times": times,
        "measured": measured,
    }
    write(report, settings.out, console)


def planned_trace(manifest: Any, lengths: Sequence[int], console: Console, name: str) -> dict[str, Any]:
    """Every strategy on one trace."""
    console.print(f"planning {len(lengths):,} requests: {name}")
    return {strategy: planned_strategy(manifest, lengths, strategy) for strategy in strategies()}


def strategies() -> tuple[str, ...]:
    from turbo_tvm.runtime.memory.arena import STRATEGY_NAMES

    return STRATEGY_NAMES


def planned_strategy(manifest: Any, lengths: Sequence[int], strategy: str) -> dict[str, Any]:
    """One strategy: per request bytes held, peak over lower bound, and seconds of planning."""
    from turbo_tvm.runtime.batch import symbols
    from turbo_tvm.runtime.memory.arena import Arena
    from turbo_tvm.runtime.memory.planner import COMPACT, lower_bound
    from turbo_tvm.runtime.memory.table import MemoryTable

    table = MemoryTable(manifest.buffers, strategy in COMPACT)
    largest = symbols(manifest.layout, manifest.row_tile, (manifest.bounds.max_length,))
    arena: Arena[int] = Arena(table, lambda size: size, strategy=strategy, largest=largest)
    held: list[int] = []
    ratios: list[float] = []
    new: list[float] = []
    known: list[float] = []
    for length in lengths:
        batch = symbols(manifest.layout, manifest.row_tile, (length,))
        plans, start = arena.statistics.plans, time.perf_counter()
        plan = arena.hold(batch)
        seconds = time.perf_counter() - start
        (new if arena.statistics.plans > plans else known).append(seconds)
        held.append(arena.bytes_held)
        bound = lower_bound(table.records, table.sizes(batch))
        ratios.append((plan.peak if strategy in ("compact", "turbo2021") else arena.bytes_held) / bound)
    did = arena.statistics
    return {
        "held": held,
        "peak_held": max(held),
        "mean_held": mean(held),
        "bytes_per_request": (did.bytes_allocated + did.bytes_freed) / len(lengths),
        "allocations": did.allocations,
        "statistics": asdict(did),
        "worst_ratio": max(ratios),
        "mean_ratio": mean(ratios),
        "new_plan_s": median(new) if new else None,
        "worst_new_plan_s": max(new) if new else None,
        "known_plan_s": median(known) if known else None,
    }


def planning_times(manifest: Any) -> dict[str, Any]:
    """Seconds from a batch's shape to its tensors: for shapes that are new, and for those that were seen lately."""
    from turbo_tvm.runtime.batch import symbols
    from turbo_tvm.runtime.memory.buffers import Buffers

    row = manifest.row_tile
    buffers = Buffers(manifest.buffers)
    buffers.tensors(symbols(manifest.layout, row, (row * (SHAPES + 1),)))  # memory for all of them
    new: list[float] = []
    known: list[float] = []
    for tiles in range(1, SHAPES + 1):
        batch = symbols(manifest.layout, row, (row * tiles,))
        for samples in (new, *[known] * 5):
            start = time.perf_counter()
            buffers.tensors(batch)
            samples.append(time.perf_counter() - start)
    return {"tensors": len(manifest.buffers), "new_s": new, "known_s": known}


TIME_COLUMNS = ("model", "tensors", "new shape, us: median", "worst", "known shape, us: median", "worst")


def time_rows(times: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, found in times.items():
        figures = [f"{1e6 * f(found[key]):.1f}" for key in ("new_s", "known_s") for f in (median, max)]
        rows.append((name, str(found["tensors"]), *figures))
    return rows


def measure_all(
    streams: Mapping[str, Sequence[int]], requests: int, directory: Path, threads: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Resident memory by trace and engine."""
    found: dict[str, dict[str, Any]] = {}
    for name, lengths in streams.items():
        chosen = lengths[:: max(1, len(lengths) // requests)] if name == "growing" else lengths[:requests]
        found[name] = {}
        for engine in ENGINES:
            console.print(f"measuring {len(chosen)} requests, {name}: {engine}")
            found[name][engine] = measured_trace(engine, chosen, directory, threads)
    return found


def measured_trace(engine: str, lengths: Sequence[int], directory: Path, threads: int) -> dict[str, Any]:
    """Resident memory of a process of its own, in bytes; or why there is none."""
    asked = json.dumps({"engine": engine, "lengths": list(lengths), "directory": str(directory), "threads": threads})
    child = subprocess.run(
        [sys.executable, "-m", "benchmark.memory_child"], input=asked, capture_output=True, text=True, check=False
    )
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        return {"absent": lines[-1] if lines else f"exit status {child.returncode}"}
    return json.loads(child.stdout.splitlines()[-1])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(*columns)
    for row in rows:
        made.add_row(*row)
    return made


PLANNED_COLUMNS = (
    "trace",
    "strategy",
    "peak held, MB",
    "mean held, MB",
    "allocated + freed per request, kB",
    "allocations",
    "peak / lower bound, worst",
    "mean",
    "new plan, us",
    "known, us",
)


def planned_rows(trace: str, by_strategy: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            trace,
            strategy,
            f"{f['peak_held'] / MB:.2f}",
            f"{f['mean_held'] / MB:.2f}",
            f"{f['bytes_per_request'] / 1e3:,.1f}",
            f"{f['allocations']:,}",
            f"{f['worst_ratio']:.3f}",
            f"{f['mean_ratio']:.3f}",
            "" if f["new_plan_s"] is None else f"{1e6 * f['new_plan_s']:.0f}",
            "" if f["known_plan_s"] is None else f"{1e6 * f['known_plan_s']:.1f}",
        )
        for strategy, f in by_strategy.items()
    ]


MEASURED_COLUMNS = ("trace", "engine", "requests", "after loading, MB", "growth at the end, MB", "largest growth, MB")


def measured_rows(trace: str, by_engine: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for engine, f in by_engine.items():
        if "absent" in f:
            rows.append((trace, engine, f"absent: {f['absent']}", "", "", ""))
            continue
        base = f["after_first"]
        growth = [r - base for r in f["resident"]]
        numbers = (f"{len(growth):,}", f"{base / MB:,.0f}", f"{growth[-1] / MB:.1f}", f"{(f['most'] - base) / MB:.1f}")
        rows.append((trace, engine, *numbers))
    return rows


def all_rows(by_trace: Mapping[str, Any], rows: Callable[[str, Any], list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    return [row for trace, found in by_trace.items() for row in rows(trace, found)]


def write(report: dict[str, Any], out: Path, console: Console) -> None:
    """JSON with every sample, Markdown, and a picture if matplotlib is there."""
    from . import memory_plot
    from .plots import PlotsAbsent

    write_json(out / "memory.json", report)
    (out / "memory.md").write_text(markdown(report))
    written = ["memory.json", "memory.md"]
    try:
        memory_plot.draw(report, out / "memory.png")
        written.append("memory.png")
    except PlotsAbsent as absent:
        console.print(str(absent))
    console.print(f"{out}/: {', '.join(written)}")


def markdown(report: dict[str, Any]) -> str:
    planned, measured = all_rows(report["planned"], planned_rows), all_rows(report["measured"], measured_rows)
    parts = [
        f"# Memory between kernels: {report['model']}\n",
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads\n",
        f"    {report['command']}    # {report['started']}, revision {report['revision']}\n",
        "## Planned\n",
        f"{len(next(iter(report['traces'].values()))):,} requests of one sequence each, handled by the arena that "
        "serves models. Held: chunks, after each request. The lower bound is the most bytes alive in any step, of the "
        "strategy's own tensors: `compact` and `static` write over inputs that die, the others do not. Over it stands "
        "the peak of a plan, or what is held (`pooled`, `static`).\n",
        _markdown_table(PLANNED_COLUMNS, planned),
        "From a batch's shape to its tensors, `deep` being an encoder of 48 layers:\n",
        _markdown_table(TIME_COLUMNS, time_rows(report["times"])),
    ]
    if measured:
        parts += [
            "## Measured\n",
            "Resident memory of a process of its own, beyond what it had after a first request of one token.\n",
            _markdown_table(MEASURED_COLUMNS, measured),
        ]
    return "\n".join(parts)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(markdown_row(line) for line in lines) + "\n"
