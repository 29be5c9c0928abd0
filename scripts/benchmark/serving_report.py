"""Markdown and PNG of `scripts/bench serving`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from . import pages
from .plots import new_figure, save
from .report import markdown_row
from .results import Record, described, pairwise, percentiles

BASE = "nobatch"
LEFT_OUT = (  # of a trial's fields, in a summary
    *("latency_s", "batch_tokens", "batch_s", "predicted_s"),
    *("answered_per_s", "simulated_mean_batch"),
)
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


def summarized(report: Record) -> Record:
    """Return percentiles in place of latencies, and rates in short; a trial's batches become their number."""
    idle = {name: percentiles(samples) for name, samples in report["idle"].items()}
    return {**report, "idle": idle, "loads": {name: _load(load) for name, load in report["loads"].items()}}


def _load(load: Record) -> Record:
    base = load["saturation"].get(BASE)
    saturation = [
        {"policy": policy, **described(rates), **({"over_nobatch": pairwise(rates, base)["median"]} if base else {})}
        for policy, rates in load["saturation"].items()
    ]
    trials = [{"policy": policy, **_trial(t)} for policy, trials in load["trials"].items() for t in trials]
    kept = {key: value for key, value in load.items() if key not in ("policies", "cost")}
    cost = {key: load["cost"][key] for key in ("kind", "points", "error")}
    return {**kept, "cost": cost, "saturation": saturation, "trials": trials}


def _trial(t: Record) -> Record:
    """A trial without its samples; latencies in milliseconds."""
    kept = {key: value for key, value in t.items() if key not in LEFT_OUT}
    latency = {key: value for key, value in percentiles([1e3 * s for s in t["latency_s"]]).items() if key != "count"}
    return {**kept, "batches": len(t["batch_s"]), "latency_ms": latency}


def critical(trials: Sequence[dict[str, Any]]) -> tuple[float, float | None]:
    """The highest rate with bounded latency (0: none), and the lowest rate above it without (None: none)."""
    borne = max((t["rate"] for t in trials if t["bounded"]), default=0.0)
    return borne, min((t["rate"] for t in trials if t["rate"] > borne), default=None)


def trials_of(load: Record, policy: str) -> list[Record]:
    """The trials of a policy, in a summary."""
    return [t for t in load["trials"] if t["policy"] == policy]


def overview_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per load and policy."""
    rows: list[tuple[str, ...]] = []
    for name, load in report["loads"].items():
        for rates in load["saturation"]:
            policy, ratio = rates["policy"], rates.get("over_nobatch")
            trials = trials_of(load, policy)
            borne, too_much = critical(trials)
            ratios = [1e3 * t["simulated_mean_s"] / t["latency_ms"]["mean"] for t in trials if t["bounded"]]
            rows.append(
                (
                    name,
                    policy,
                    f"{rates['median']:.1f}",
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
    return [_trial_row(t) for t in load["trials"]]


def _trial_row(t: Record) -> tuple[str, ...]:
    latency, simulated = t["latency_ms"], 1e3 * t["simulated_mean_s"]
    return (
        t["policy"],
        f"{t['rate']:.1f}",
        f"{t['fraction']:.2f}",
        "yes" if t["bounded"] else "no",
        *(f"{latency[key]:.0f}" for key in ("mean", "p50", "p95", "p99")),
        f"{t['mean_batch']:.1f}",
        f"{simulated:.0f}",
        f"{1e3 * t['simulated_p99_s']:.0f}",
        f"{simulated / latency['mean']:.2f}",
    )


def markdown(report: dict[str, Any], name: str = "serving") -> str:
    """The page of a summary."""
    m = report["machine"]
    parts = [
        "# The engine under load\n",
        f"{m['cpu']}, {m['threads']} threads\n",
        *[f"    {r['command']}    # {r['started']}, revision {r['revision']}" for r in report["runs"]],
        NOTE,
        _table(OVERVIEW, overview_rows(report)),
        "Idle engine, from `submit` to the first kernel, one request at a time: "
        + "; ".join(
            f"{model} p50 {1e6 * s['p50']:.0f} us, p99 {1e6 * s['p99']:.0f} us" for model, s in report["idle"].items()
        )
        + "\n",
        f"![latency against rate]({name}.png)\n",
    ]
    for title, load in report["loads"].items():
        error = load["cost"]["error"]
        parts += [
            f"## {title}\n",
            f"Cost model: {load['cost']['kind']}, {load['cost']['points']} measured batches, off by {error:.1%} on "
            "average on those held out.\n",
            _table(TRIALS, trial_rows(load)),
        ]
    return "\n".join(parts)


def draw(report: dict[str, Any], path: Path) -> None:
    """Mean and p99 latency against rate, a panel per load: measured with solid lines, simulated with dashed ones."""
    loads = report["loads"]
    columns = min(4, len(loads))
    lines = -(-len(loads) // columns)
    figure = new_figure(max(6.0, 3.3 * columns), 0.8 + 2.4 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, load) in zip(axes, loads.items(), strict=False):
        _panel(axis, load)
        axis.set_title(name, fontsize=9)
    for axis in axes[len(loads) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{report['machine']['cpu']}: latency in ms over requests/s; mean (o), p99 (^), simulated mean (x, dashed)",
        fontsize=10,
    )
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=9)
    save(figure, path)


def _panel(axis: Any, load: Record) -> None:
    for policy in dict.fromkeys(t["policy"] for t in load["trials"]):
        trials = trials_of(load, policy)
        colour, rates = COLOURS.get(policy), [t["rate"] for t in trials]
        style = {"color": colour, "markersize": 4, "linewidth": 1}
        axis.plot(rates, [t["latency_ms"]["mean"] for t in trials], "o-", label=policy, **style)
        axis.plot(rates, [t["latency_ms"]["p99"] for t in trials], "^:", **style)
        axis.plot(rates, [1e3 * t["simulated_mean_s"] for t in trials], "x--", **style)
    axis.set(yscale="log")
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_row(line) for line in [columns, ["---"] * len(columns), *rows]) + "\n"


PAGE = pages.Page("serving", summarized, markdown, draw)
