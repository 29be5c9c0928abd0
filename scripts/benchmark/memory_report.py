"""The summary and the page of `scripts/bench memory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from . import memory_plot, pages
from .report import markdown_row
from .results import described, thinned

MB = 1e6
CURVE_POINTS = 70  # of memory over the requests that a summary keeps

TIME_COLUMNS = ("model", "tensors", "new shape, us: median", "worst", "known shape, us: median", "worst")


def time_rows(times: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, found in times.items():
        figures = [f"{1e6 * found[key][f]:.1f}" for key in ("new_s", "known_s") for f in ("median", "worst")]
        rows.append((name, str(found["tensors"]), *figures))
    return rows


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
        growth, most = f["resident"][-1] - base, f["most"] - base
        rows.append(
            (trace, engine, f"{f['requests']:,}", f"{base / MB:,.0f}", f"{growth / MB:.1f}", f"{most / MB:.1f}")
        )
    return rows


def all_rows(by_trace: Mapping[str, Any], rows: Callable[[str, Any], list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    return [row for trace, found in by_trace.items() for row in rows(trace, found)]


def summarized(report: dict[str, Any]) -> dict[str, Any]:
    """Return thinner curves of memory, times in short, and of the traces their lengths in short."""
    planned = {
        trace: {strategy: {**found, "held": thinned(found["held"], CURVE_POINTS)} for strategy, found in each.items()}
        for trace, each in report["planned"].items()
    }
    made = {"planned": planned, "times": summarized_times(report["times"])}
    return {
        **report,
        **made,
        "traces": {trace: described(lengths) for trace, lengths in report["traces"].items()},
        "measured": summarized_growth(report["measured"]),
    }


def summarized_times(times: Mapping[str, Any]) -> dict[str, Any]:
    """Median, quartiles and worst time of planning, by model."""
    return {
        name: {
            "tensors": found["tensors"],
            **{key: {**described(found[key]), "worst": max(found[key])} for key in ("new_s", "known_s")},
        }
        for name, found in times.items()
    }


def summarized_growth(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Thinner curves of resident memory, by trace and engine."""
    return {
        trace: {engine: _thinner(found) for engine, found in by_engine.items()} for trace, by_engine in measured.items()
    }


def _thinner(found: Mapping[str, Any]) -> dict[str, Any]:
    if "absent" in found:
        return dict(found)
    return {**found, "requests": len(found["resident"]), "resident": thinned(found["resident"], CURVE_POINTS)}


def markdown(report: dict[str, Any], name: str = "memory") -> str:
    """The page of a summary."""
    planned, measured = all_rows(report["planned"], planned_rows), all_rows(report["measured"], measured_rows)
    parts = [
        f"# Memory between kernels: {report['model']}\n",
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads\n",
        f"    {report['command']}    # {report['started']}, revision {report['revision']}\n",
        "## Planned\n",
        f"{next(iter(report['traces'].values()))['count']:,} requests of one sequence each, handled by the arena that "
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


PAGE = pages.Page("memory", summarized, markdown, memory_plot.draw)
