"""The server over a long time: whether its memory grows near what it bears; then a burst, and what comes after."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import machine, pages
from .plots import new_figure, save
from .results import percentiles, thinned
from .server import Contender, ask_closed, ask_open, ours, sentences

FRACTION, BURST = 0.8, 10.0  # of the critical rate
BURST_S = 5.0
MAX_QUEUE = 1024  # what `turbo-tvm serve` takes by default
WARM_S = 60.0  # after which memory must stay
SAMPLE_S = 1.0
CURVE_POINTS = 120  # of resident memory that a summary keeps
LOOPS, LOOP = 3, 600  # requests of each
DISTINCT = 20_000


@dataclass(frozen=True)
class Settings:
    """What was asked on the command line."""

    command: str
    artifact: Path
    minutes: float
    threads: int
    seed: int
    out: Path


def run(settings: Settings, console: Console) -> None:
    """Measure and write the page."""
    texts = sentences(DISTINCT, settings.seed)  # the engine computes equal ones that wait together once
    report = machine.measured_by(settings.command, settings.threads)
    with ours(settings.artifact, settings.threads, MAX_QUEUE) as server, _Memory(server.pid) as memory:
        ask_closed(server, texts[:100], 8)
        critical = min(ask_closed(server, texts[:LOOP], 32).rate for _ in range(LOOPS))
        report["critical"] = critical
        console.print(f"critical rate {critical:.1f}/s, {settings.minutes:g} minutes at {FRACTION:g} of it")
        memory.restart()
        report["soak"] = _load(server, texts, FRACTION * critical, 60 * settings.minutes, settings.seed)
        report["rss"] = memory.samples()
        report["burst"] = _load(server, texts, BURST * critical, BURST_S, settings.seed + 1)
        report["after"] = _load(server, texts, 0.5 * critical, 10.0, settings.seed + 2)
    summary = pages.keep(PAGE, report, settings.out / "soak.json")
    pages.show(PAGE, summary, settings.out / "soak.json", console)
    console.print(markdown(summary))


def _load(server: Contender, texts: list[str], rate: float, seconds: float, seed: int) -> dict[str, Any]:
    answers = ask_open(server, texts, rate, seconds, seed)
    statuses = {str(status): count for status, count in sorted(answers.statuses.items())}
    latency = [round(s, 5) for s in answers.latency_s]
    return {"rate": rate, "seconds": answers.seconds, "statuses": statuses, "latency_s": latency}


class _Memory:
    """Resident memory of a process, sampled in a thread."""

    def __init__(self, pid: int):
        self._pid, self._stop = pid, threading.Event()
        self._found: list[tuple[float, int]] = []
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def restart(self) -> None:
        """Count from now."""
        self._started, self._found = time.monotonic(), []

    def samples(self) -> list[tuple[float, int]]:
        """Seconds and bytes so far."""
        return list(self._found)

    def _sample(self) -> None:
        import psutil

        process = psutil.Process(self._pid)
        while not self._stop.wait(SAMPLE_S):
            self._found.append((round(time.monotonic() - self._started, 2), process.memory_info().rss))


def drift(samples: list[tuple[float, int]]) -> float:
    """How much memory grew from the second minute to the last one, as a fraction."""
    late = [size for at, size in samples if at >= WARM_S]
    if len(late) < 2:
        return 0.0
    share = max(1, len(late) // 10)
    return float(np.median(late[-share:]) / np.median(late[:share]) - 1)


def summarized(report: dict[str, Any]) -> dict[str, Any]:
    """Return percentiles in place of latencies, and a thinner curve of resident memory."""
    loads = {name: _summarized(report[name]) for name in ("soak", "burst", "after")}
    memory = {"rss": thinned(report["rss"], CURVE_POINTS), "rss_samples": len(report["rss"])}
    return {**report, **loads, **memory, "drift": drift(report["rss"])}


def _summarized(load: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in load.items() if key != "latency_s"}
    return made | {"latency": percentiles(load["latency_s"])}


def markdown(report: dict[str, Any], name: str = "soak") -> str:
    """The page of a summary."""
    here, soak, burst, after = report["machine"], report["soak"], report["burst"], report["after"]
    latest = report["rss"][-1][1] if report["rss"] else 0
    return "\n".join(
        [
            "# A long time, and a burst",
            "",
            f"{here['cpu']}, {here['threads']} threads. MiniLM-L6, texts of mixed length, Poisson arrivals; at most "
            f"{MAX_QUEUE} may wait. The client runs on the same cores.",
            "",
            f"    {report['command']}    # {report['started']}, revision {report['revision']}",
            "",
            f"- critical rate, the least of {LOOPS} closed loops of 32: {report['critical']:.1f} requests/s",
            f"- {soak['seconds']:.0f} s at {FRACTION:g} of it: {_statuses(soak)}; {_times(soak)}",
            f"- resident memory: {latest / 2**20:.0f} MiB at the end, {100 * report['drift']:+.2f} % since the "
            "first minute",
            f"- {BURST_S:.0f} s at {BURST:g} times it: {_statuses(burst)}; {_times(burst)}",
            f"- then half of it: {_statuses(after)}; {_times(after)}",
            "",
        ]
    )


def _statuses(one: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} with {status}" for status, count in one["statuses"].items())


def _times(one: dict[str, Any]) -> str:
    if not one["latency"]["count"]:
        return "none answered"
    p50, p99 = (1e3 * one["latency"][p] for p in ("p50", "p99"))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Resident memory over time. Raises PlotsAbsent."""
    figure = new_figure(8, 3.5)
    axes = figure.add_subplot()
    axes.plot([at for at, _ in report["rss"]], [size / 2**20 for _, size in report["rss"]])
    axes.set(xlabel="seconds", ylabel="resident memory in MiB", ylim=(0, None))
    axes.grid(True, alpha=0.2)
    save(figure, path)


PAGE = pages.Page("soak", summarized, markdown, draw)
