"""The summary, page and picture of `scripts/bench server`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from . import pages
from .plots import new_figure, save
from .report import markdown_row
from .results import percentiles

RIVAL, OURS = "infinity-emb", "turbo_tvm "
BEARS_S = 2.0  # a rate is borne if p99 stays below this and nothing is refused


def answers_per_s(one: dict[str, Any]) -> float:
    """Answers per second, from raw samples."""
    return len(one["latency_s"]) / one["seconds"]


def borne(one: dict[str, Any]) -> bool:
    """Whether a trial's rate was borne, from its summary."""
    return set(one["statuses"]) == {"200"} and one["latency"]["p99"] < BEARS_S


def summarized(report: dict[str, Any]) -> dict[str, Any]:
    """Return rates and percentiles in place of latencies, and the texts' lengths in short."""
    words = report["words"]
    made = {**report, "words": {"count": len(words), "mean": float(np.mean(words)), "most": max(words)}}
    for kind in ("closed", "open"):
        made[kind] = [_summarized(one) for one in report[kind]]
    return made


def _summarized(load: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in load.items() if key != "latency_s"}
    return made | {"answers_per_s": answers_per_s(load), "latency": percentiles(load["latency_s"])}


def markdown(report: dict[str, Any], name: str = "server") -> str:
    """The page of a summary."""
    here, words = report["machine"], report["words"]
    lines = [
        "# The server under load",
        "",
        f"{here['cpu']}, {here['threads']} threads, TVM {here['packages']['apache-tvm']}. MiniLM-L6, real weights; "
        f"{words['count']} texts of log-normal length, {words['mean']:.0f} words on average; one text per request, "
        "`/v1/embeddings`. The client runs on the same cores.",
        "",
        f"    {report['command']}    # {report['started']}, revision {report['revision']}",
        "",
        "## Closed loop",
        "",
        "Medians over the rounds; x: the median over the rounds of our rate to the rival's.",
        "",
    ]
    names = list(dict.fromkeys(one["server"] for one in report["closed"]))
    lines += [markdown_row(["clients", *names]), markdown_row(["---"] * (1 + len(names)))]
    for clients in sorted({one["clients"] for one in report["closed"]}):
        lines.append(markdown_row([str(clients), *(_closed_cell(report, name, clients) for name in names)]))
    limits = [report["limit"].get(name.removeprefix(OURS)) for name in names]
    lines.append(markdown_row(["at the peak", *("" if limit is None else f"{limit:.0f}/s" for limit in limits)]))
    lines += [
        "",
        "At the peak: if the machine did nothing but the multiplications of the model, as fast as it was measured to "
        f"do them at most ({_peaks(report['limits'])}).",
        "",
        _beside_the_model(report["overhead"]),
    ]
    lines += [
        "",
        "## Poisson arrivals",
        "",
        "p50 / p95 / p99 in ms; – where the rate is beyond what the server bears.",
        "",
    ]
    lines += [markdown_row(["requests/s", *names]), markdown_row(["---"] * (1 + len(names)))]
    for each in sorted({one["rate"] for one in report["open"]}):
        lines.append(markdown_row([f"{each:g}", *(_open_cell(report, name, each) for name in names)]))
    lines += [f"\n{name} is absent: {why}" for name, why in report["absent"].items()]
    return "\n".join(lines) + "\n"


def _beside_the_model(overhead: Mapping[str, Any]) -> str:
    """What a request costs in CPU time without the model, and what takes it where that was measured."""
    spent = [one["cpu_s"] * 1e6 for one in overhead["trials"]]
    text = (
        f"Beside the model a request costs {median(spent):.0f} µs of CPU ({min(spent):.0f} to {max(spent):.0f} in "
        f"{len(spent)} trials of {overhead['requests']:,}): one client asks for an answer, to {overhead['words']} "
        "words, that is kept."
    )
    if "inside" not in overhead:
        return f"{text} This is HTTP, tokenisation and the engine."
    inside = {name: median(cpu_s) * 1e6 for name, cpu_s in overhead["inside"].items()}
    return (
        f"{text} Called by themselves the tokenizer takes {inside['tokenizer']:.0f} µs of it and the engine "
        f"{inside['engine']:.0f} µs; HTTP and the turns of threads take the rest, "
        f"{median(spent) - sum(inside.values()):.0f} µs."
    )


def _peaks(limits: Mapping[str, Any]) -> str:
    found = {"fp32": limits["fp32_flops"], "bf16": limits["bf16_flops"]}
    return ", ".join(f"{name} {flops * 1e-9:,.0f} GFLOP/s" for name, flops in found.items() if flops)


def _closed_cell(report: dict[str, Any], name: str, clients: int) -> str:
    rates = {
        one: [r["answers_per_s"] for r in report["closed"] if r["server"] == one and r["clients"] == clients]
        for one in (name, RIVAL)
    }
    text = f"{median(rates[name]):.1f}/s"
    if name == RIVAL or not rates[RIVAL]:
        return text
    return f"{text} ({median(a / b for a, b in zip(rates[name], rates[RIVAL], strict=True)):.1f}x)"


def _open_cell(report: dict[str, Any], name: str, each: float) -> str:
    for one in report["open"]:
        if one["server"] == name and one["rate"] == each and one["latency"]["count"]:
            text = " / ".join(f"{1e3 * one['latency'][p]:.1f}" for p in ("p50", "p95", "p99"))
            return text if borne(one) else f"({text})"
    return "–"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Rate against p50 and p99. Raises PlotsAbsent."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for number, name in enumerate(dict.fromkeys(one["server"] for one in report["open"])):
        mine = sorted((one for one in report["open"] if one["server"] == name), key=lambda one: one["rate"])
        for percent, style in (("p50", "-"), ("p99", "--")):
            values = [1e3 * one["latency"][percent] for one in mine]
            label = f"{name}, {percent}"
            axes.plot([one["rate"] for one in mine], values, style, marker="o", color=f"C{number}", label=label)
    axes.set(xlabel="requests per second, Poisson", ylabel="latency in ms", xscale="log", yscale="log")
    axes.grid(True, alpha=0.2, which="both")
    axes.legend()
    save(figure, path)


PAGE = pages.Page("server", summarized, markdown, draw)
