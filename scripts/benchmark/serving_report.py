"""Markdown and PNG of `scripts/bench serving`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .plots import new_figure, write_plot
from .report import markdown_row
from .results import write_json

BASE = "nobatch"
COLOURS = {
    **{"nobatch": "tab:gray", "naive": "tab:red", "token_budget": "tab:orange"},
    **{"dp": "tab:green", "dp_latency": "tab:blue", "deadline": "tab:purple"},
}
OVERVIEW = (
    *("load", "policy", "saturated, requests/s", "over nobatch", "critical rate between", "padding"),
    "simulated / measured mean latency, bounded trials",
)
TRIALS = (
    *("policy", "requests/s", "of saturation", "bounded", "mean ms", "p50", "p95", "p99", "batch"),
    *("simulated mean ms", "simulated p99", "simulated / measured mean"),
)

NOTE = """
Saturated: the same requests, all at once, median of the rounds; the ratio is the median of the rounds' ratios. That is
the critical rate of a queue that never empties. Poisson trials bracket it: between the highest tried rate with bounded
latency and the next one, without (a twentieth of the requests and more unanswered when the last one came, and a last
fifth that waited more than 1.5 times as long as the first half); a trial of less than some hundred requests may look
either way by chance. Padded: the same kernels on sequences filled up to the longest of their batch. Simulated: the
trial's own arrivals, with the cost refined by all of the trial's batches, and their scatter. No request had a deadline.
"""


def write(report: dict[str, Any], out: Path, console: Console) -> None:
    """`serving.json` with every latency, `serving.md`, and `serving.png` if matplotlib is there."""
    write_json(out / "serving.json", report)
    (out / "serving.md").write_text(markdown(report))
    write_plot(draw, report, out / "serving.png", console)


def critical(trials: Sequence[dict[str, Any]]) -> tuple[float, float | None]:
    """The highest rate with bounded latency (0: none), and the lowest rate above it without (None: none)."""
    borne = max((t["rate"] for t in trials if t["bounded"]), default=0.0)
    return borne, min((t["rate"] for t in trials if t["rate"] > borne), default=None)


def render(out: Path, console: Console) -> bool:
    """Markdown and picture again from `serving.json`; False if there is none."""
    path = out / "serving.json"
    if not path.exists():
        return False
    write(json.loads(path.read_text()), out, console)
    console.print(f"{out}/: serving.md, serving.png")
    return True


def overview_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per load and policy."""
    rows: list[tuple[str, ...]] = []
    for name, load in report["loads"].items():
        base = load["saturation"].get(BASE)
        for policy, rates in load["saturation"].items():
            ratio = median(a / b for a, b in zip(rates, base, strict=True)) if base else None
            trials = load["trials"][policy]
            borne, too_much = critical(trials)
            ratios = [t["simulated_mean_s"] / np.mean(t["latency_s"]) for t in trials if t["bounded"]]
            rows.append(
                (
                    name,
                    policy,
                    f"{median(rates):.1f}",
                    "" if ratio is None else f"{ratio:.2f}x",
                    f"{borne:.1f} .. " + ("" if too_much is None else f"{too_much:.1f}"),
                    f"{np.mean([t['padding_waste'] for t in trials]):.0%}",
                    ", ".join(f"{r:.2f}" for r in ratios),
                )
            )
    return rows


def overview(report: dict[str, Any]) -> Table:
    """The same for a terminal."""
    made = Table(*OVERVIEW)
    for row in overview_rows(report):
        made.add_row(*row)
    return made


def trial_rows(load: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per policy and rate."""
    rows: list[tuple[str, ...]] = []
    for policy, trials in load["trials"].items():
        for t in trials:
            latency = 1e3 * np.array(t["latency_s"])
            percentiles = [f"{np.percentile(latency, p):.0f}" for p in (50, 95, 99)]
            simulated = 1e3 * t["simulated_mean_s"]
            rows.append(
                (
                    policy,
                    f"{t['rate']:.1f}",
                    f"{t['fraction']:.2f}",
                    "yes" if t["bounded"] else "no",
                    f"{latency.mean():.0f}",
                    *percentiles,
                    f"{t['mean_batch']:.1f}",
                    f"{simulated:.0f}",
                    f"{1e3 * t['simulated_p99_s']:.0f}",
                    f"{simulated / latency.mean():.2f}",
                )
            )
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    m = report["machine"]
    parts = [
        "# The engine under load\n",
        f"{m['cpu']}, {m['threads']} threads\n",
        *[f"    {r['command']}    # {r['started']}, revision {r['revision']}" for r in report["runs"]],
        NOTE,
        _table(OVERVIEW, overview_rows(report)),
        "Idle engine, from `submit` to the first kernel, one request at a time: "
        + "; ".join(
            f"{name} p50 {1e6 * median(s):.0f} us, p99 {1e6 * np.percentile(s, 99):.0f} us"
            for name, s in report["idle"].items()
        )
        + "\n",
        "![latency against rate](serving.png)\n",
    ]
    for name, load in report["loads"].items():
        error = load["cost"]["error"]
        parts += [
            f"## {name}\n",
            f"Cost model: {load['cost']['kind']}, {load['cost']['points']} measured batches, off by {error:.1%} on "
            "average on those held out.\n",
            _table(TRIALS, trial_rows(load)),
        ]
    return "\n".join(parts)


def draw(report: dict[str, Any], path: Path) -> None:
    """Mean and p99 latency against rate, a panel per load: measured with solid lines, simulated with dashed ones."""
    loads = report["loads"]
    columns = min(3, len(loads))
    lines = -(-len(loads) // columns)
    figure = new_figure(6 * columns, 4.4 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, load) in zip(axes, loads.items(), strict=False):
        for policy, trials in load["trials"].items():
            colour, rates = COLOURS.get(policy), [t["rate"] for t in trials]
            axis.plot(rates, [1e3 * np.mean(t["latency_s"]) for t in trials], "o-", color=colour, label=policy)
            axis.plot(rates, [1e3 * np.percentile(t["latency_s"], 99) for t in trials], "^:", color=colour, alpha=0.6)
            axis.plot(rates, [1e3 * t["simulated_mean_s"] for t in trials], "x--", color=colour)
        axis.set(title=name, xlabel="requests/s", ylabel="latency, ms", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(loads) :]:
        axis.set_visible(False)
    figure.suptitle(f"{report['machine']['cpu']}: mean (o), p99 (^), simulated mean (x, dashed)")
    figure.savefig(path, dpi=100)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_row(line) for line in [columns, ["---"] * len(columns), *rows]) + "\n"
