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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from . import machine, models, pages
from .memory_child import ENGINES
from .memory_report import (
    MEASURED_COLUMNS,
    PAGE,
    PLANNED_COLUMNS,
    TIME_COLUMNS,
    all_rows,
    measured_rows,
    planned_rows,
    summarized_growth,
    summarized_times,
    table,
    time_rows,
)
from .onnx_files import OnnxFiles
from .traces import traces

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
    """Plan and measure all traces, and write the page."""
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
        console.print(table(TIME_COLUMNS, time_rows(summarized_times(times))))
        measured = {}
        if settings.measured:
            OnnxFiles(model, Path(directory)).exported("sdpa")
            model.save_pretrained(Path(directory) / "model")
            measured = measure_all(streams, settings.measured, Path(directory), threads, console)
            console.print(table(MEASURED_COLUMNS, all_rows(summarized_growth(measured), measured_rows)))
    report = {
        "model": settings.model,
        "seed": settings.seed,
        **machine.measured_by(settings.command, threads),
        "traces": streams,
        "planned": planned,
        "times": times,
        "measured": measured,
    }
    pages.publish(PAGE, report, settings.out / "memory.json", console)


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
    largest = symbols(manifest.layout, manifest.row_tile, (manifest.request_limits.max_length,))
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
