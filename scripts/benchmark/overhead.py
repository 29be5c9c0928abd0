"""What a call of `run` costs above its kernels: a one-layer toy model, whose kernels take next to nothing.

Two parts: Python (checks, packing, splitting: `run` without the call of TVM's VM) and the VM (its call without the
kernels). Hot: call after call. Cold: the caches are overwritten before each call, as large kernels do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from . import machine, models, pages
from .report import markdown_row

TOY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
EVICTED_BYTES = 128 << 20
WARM_UPS = 20
HOT_SHARE = 10  # hot rounds per cold one
COLUMNS = ("workload", "part", "median us", "quartiles us")


def workloads(seed: int) -> dict[str, tuple[int, ...]]:
    ragged = np.random.default_rng(seed).integers(2, 101, 32)
    return {"1x8": (8,), "1x16": (16,), "ragged-2-100": tuple(ragged.tolist())}


def run(rounds: int, threads: int, seed: int, out: Path, command: str, console: Console) -> None:
    """Measure, print a table and write the page."""
    import turbo_tvm

    console.print("compiling a one-layer model of hidden size 64")
    model = turbo_tvm.compile(models.build(TOY, seed), threads=threads, progress=False)
    found = {name: measure(model, lengths, rounds, seed) for name, lengths in workloads(seed).items()}
    console.print(table(found))
    console.print(f"load average {machine.load_average()}, {threads} threads, {rounds} hot rounds")
    report = {
        "sizes": TOY,
        "seed": seed,
        **machine.measured_by(command, threads),
        "workloads": {name: {"lengths": workloads(seed)[name], "samples_s": parts} for name, parts in found.items()},
    }
    pages.publish(PAGE, report, out / "overhead.json", console)


def measure(model: Any, lengths: tuple[int, ...], rounds: int, seed: int) -> dict[str, list[float]]:
    """Samples in seconds by part; "run above kernels" and its VM part are differences within a round of the profile."""
    profiled = model.profile(lengths, rounds=rounds, seed=seed).samples
    return {
        "run above kernels": differences(profiled["run"], profiled["kernels"]),
        "VM": differences(profiled["vm_call"], profiled["kernels"]),
        "Python, hot": python_part(model, lengths, rounds, seed, lambda: None),
        "Python, cold": python_part(model, lengths, max(rounds // HOT_SHARE, 1), seed, evict()),
        "kernels": list(profiled["kernels"]),
    }


def differences(more: Sequence[float], less: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(more, less, strict=True)]


def python_part(
    model: Any, lengths: tuple[int, ...], rounds: int, seed: int, before: Callable[[], object]
) -> list[float]:
    """Seconds of `run` less those of the VM's call in it."""
    from turbo_tvm.runtime.random_requests import random_sequences

    executor, sequences = model._executor, random_sequences(lengths, model.manifest.request_limits, seed)
    function, inside, samples = executor.function, [0.0], []

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        inside[0] = time.perf_counter() - start
        return result

    with executor.calling(timed):
        for number in range(WARM_UPS + rounds):
            before()
            start = time.perf_counter()
            model.run(sequences)
            whole = time.perf_counter() - start
            if number >= WARM_UPS:
                samples.append(whole - inside[0])
    return samples


def evict() -> Callable[[], object]:
    """A function that overwrites the caches."""
    memory = np.zeros(EVICTED_BYTES, np.uint8)
    return lambda: memory.__iadd__(1)


def quartiles_us(parts: dict[str, list[float]]) -> dict[str, list[float]]:
    """First quartile, median and third of each part, in microseconds."""
    return {
        part: [round(1e6 * q, 2) for q in np.percentile(samples, (25, 50, 75)).tolist()]
        for part, samples in parts.items()
    }


def table(found: dict[str, dict[str, list[float]]]) -> Table:
    """Median and quartiles per workload and part."""
    made = Table(*COLUMNS)
    for name, parts in found.items():
        for part, (low, middle, high) in quartiles_us(parts).items():
            made.add_row(name, part, f"{middle:.1f}", f"{low:.1f} .. {high:.1f}")
        made.add_section()
    return made


def summarized(report: dict[str, Any]) -> dict[str, Any]:
    """Return quartiles of every part in place of its samples."""
    made = {
        name: {
            "lengths": found["lengths"],
            "counts": {part: len(samples) for part, samples in found["samples_s"].items()},
            "quartiles_us": quartiles_us(found["samples_s"]),
        }
        for name, found in report["workloads"].items()
    }
    return {**report, "workloads": made}


def markdown(report: dict[str, Any], name: str = "overhead") -> str:
    """The page of a summary."""
    here = report["machine"]
    lines = [
        "# What `run` costs above its kernels",
        "",
        f"{here['cpu']}, {here['threads']} threads, a one-layer toy model.",
        "",
        f"    {report['command']}    # {report['started']}, revision {report['revision']}",
        "",
        markdown_row(COLUMNS),
        markdown_row(["---"] * len(COLUMNS)),
    ]
    for workload, found in report["workloads"].items():
        for part, (low, middle, high) in found["quartiles_us"].items():
            lines.append(markdown_row([workload, part, f"{middle:.1f}", f"{low:.1f} .. {high:.1f}"]))
    return "\n".join(lines) + "\n"


PAGE = pages.Page("overhead", summarized, markdown)
