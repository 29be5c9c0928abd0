"""The Markdown of the encoder benchmark; pure text from the dictionary of a summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures, plots
from .contenders import OURS
from .figures import Best
from .pages import Page
from .strategies import PADDED, STRATEGIES
from .workloads import RAGGED

TITLES = {"bert-base": "BERT-base", "bert-large": "BERT-large", "minilm-l6": "MiniLM-L6"}
DISTURBED_CPUS = 0.2  # used by other processes just before a workload
HOW = """One process, the same number of threads for all, contenders interleaved in rotating order. Times are medians
over the rounds; a ratio (x) is the median of the round-by-round ratios of the rival's time to turbo_tvm's: above 1,
turbo_tvm is faster. Rivals get prepared arrays; turbo_tvm gets the list of sequences and packs them within the timed
call. "Best rival" is the one with the smallest median. † was measured once, because it was far behind; the JSON says
how far.
GFLOP/s counts the work that turbo_tvm's answer needs, without padding; in brackets its part of the measured peak."""


def markdown(result: dict[str, Any], name: str) -> str:
    """The whole page; `name` is that of the summary and the PNG beside it."""
    parts = [
        f"# {TITLES.get(result['model'], result['model'])}, {result['precision']}, random weights",
        _machine(result),
        _commands(result, name),
        HOW,
        _absent(result),
        _summary(result),
        _grid(result),
        _ragged(result),
        _strategies(result),
        _checks(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(result: dict[str, Any]) -> str:
    m = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    loads = [w["load_average"][0] for w in result["workloads"]]
    load = f" Load average during the run (1 minute): {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    disturbed = [w["label"] for w in result["workloads"] if w["cpus_used_by_others"] > DISTURBED_CPUS]
    if disturbed:
        load += f" **Other processes were running before {', '.join(disturbed)}: measure these again.**"
    limits = result.get("limits")
    if limits:
        bf16 = f", bf16 {limits['bf16_flops'] * 1e-9:.0f}" if limits["bf16_flops"] else ""
        load += (
            f" Measured by turbo_tvm just before: fp32 {limits['fp32_flops'] * 1e-9:.0f}{bf16} GFLOP/s, "
            f"memory reads {limits['dram'] * 1e-9:.0f} GB/s."
        )
    return (
        f"{m['cpu']} ({', '.join(m['cpu_features'])}), {m['logical_cpus']} logical CPUs, {m['memory_gib']} GiB, "
        f"{m['threads']} threads; {m['system']}, Python {m['python']}, {packages}.{load}"
    )


def _commands(result: dict[str, Any], name: str) -> str:
    lines = [f"    {r['command']}    # {r['started']}, revision {r['revision']}" for r in result["runs"]]
    return f"Made by the following; summary in [{name}.json]({name}.json), plots in [{name}.png]({name}.png).\n\n" + (
        "\n".join(lines)
    )


def _absent(result: dict[str, Any]) -> str:
    lines = [f"- {name} is absent: {why}" for name, why in result["absent"].items()]
    for workload in result["workloads"]:
        for e in workload["entries"]:
            if "failed" in e:
                lines.append(f"- {e['contender']}, {e['strategy']}, failed on {workload['label']}: {e['failed']}")
    return "\n".join(lines)


def _summary(result: dict[str, Any]) -> str:
    overall = figures.grid_mean(result)
    if overall is None:
        return ""
    lines = [
        "## Over the grid",
        "",
        "| rival | geometric mean | least | at (batch x length) | points |",
        "|---|---|---|---|---|",
        _mean_row("**best rival of each point**", overall),
    ]
    for name in figures.contenders(result):
        mean = figures.grid_mean(result, name)
        lines += [_mean_row(name, mean)] if mean else []
    return "\n".join(lines)


def _mean_row(name: str, mean: figures.Mean) -> str:
    return f"| {name} | {mean.mean:.2f}x | {mean.least:.2f}x | {mean.point} | {mean.points} |"


def _grid(result: dict[str, Any]) -> str:
    rows = figures.grid(result)
    if not rows:
        return ""
    names = figures.contenders(result)
    head = ["batch x length", OURS, "GFLOP/s", "best rival", *names]
    lines = ["## Fixed shapes", "", markdown_row(head), markdown_row(["---"] * len(head))]
    for workload in rows:
        each = [_ratio(figures.best_rival(workload, name, PADDED)) for name in names]
        best = _named(figures.best_rival(workload, strategy=PADDED), strategy=False)
        lines.append(markdown_row([workload["label"], *_ours(workload), best, *each]))
    return "\n".join(lines)


def _ragged(result: dict[str, Any]) -> str:
    rows = [w for w in result["workloads"] if w["kind"] == RAGGED]
    if not rows:
        return ""
    head = ["requests", "tokens", OURS, "GFLOP/s", "sequences/s", "best rival, padded", "best rival, best strategy"]
    lines = ["## Ragged requests", "", markdown_row(head), markdown_row(["---"] * len(head))]
    for w in rows:
        padded, best = figures.best_rival(w, strategy=PADDED), figures.best_rival(w)
        mine = figures.ours(w)
        rate = "–" if mine is None else f"{len(w['lengths']) / figures.seconds(mine):,.0f}"
        tokens = str(w["tokens"])
        lines.append(markdown_row([w["label"], tokens, *_ours(w), rate, _named(padded, strategy=False), _named(best)]))
    return "\n".join(lines)


def _strategies(result: dict[str, Any]) -> str:
    blocks = []
    for w in (w for w in result["workloads"] if w["kind"] == RAGGED):
        head = [w["label"], *STRATEGIES]
        lines = [markdown_row(head), markdown_row(["---"] * len(head))]
        for name in dict.fromkeys(e["contender"] for e in figures.rivals(w)):
            cells = [figures.best_rival(w, name, strategy) for strategy in STRATEGIES]
            lines.append(markdown_row([name, *(f"{_ms(b.seconds)} ({_ratio(b)})" if b else "–" for b in cells)]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _checks(result: dict[str, Any]) -> str:
    if not result["contenders"]:
        return ""
    head = ["contender", "largest difference", "least cosine", "seconds to build", "details"]
    lines = ["## Answers beside PyTorch's in fp32", "", markdown_row(head), markdown_row(["---"] * len(head))]
    for name, d in result["contenders"].items():
        more = ", ".join(f"{key}: {value}" for key, value in d.items() if key not in ("check", "build_s"))
        check = d["check"]
        lines.append(
            markdown_row([name, f"{check['max_abs_diff']:.2g}", f"{check['cosine']:.6f}", f"{d['build_s']:.1f}", more])
        )
    return "\n".join(lines)


def _ours(workload: dict[str, Any]) -> list[str]:
    mine, rate = figures.ours(workload), figures.gflops(workload)
    if mine is None or rate is None:
        return ["–", "–"]
    share = workload.get("fraction_of_peak")
    return [f"**{_ms(figures.seconds(mine))}**", f"{rate:.0f}" + (f" ({share:.0%})" if share else "")]


def _named(best: Best | None, strategy: bool = True) -> str:
    if best is None:
        return "–"
    how = f", {best.strategy}" if strategy else ""
    return f"{best.contender}{how}: {_ms(best.seconds)} ({_ratio(best)})"


def _ratio(best: Best | None) -> str:
    """ "1.23x", with a dagger if it comes from one sample; a dash where the rival or ours is missing."""
    if best is None or best.ratio is None:
        return "–"
    return f"{best.ratio:.2f}x" + ("" if best.repeated else " †")


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the PNG. Raises PlotsAbsent without matplotlib."""
    plots.draw(result, path, _title(result))


def headline(result: dict[str, Any]) -> str:
    """The result over the grid, in a line."""
    mean = figures.grid_mean(result)
    if mean is None:
        return f"{_title(result)}: no ratios over the grid"
    return (
        f"{_title(result)}: best rival / ours over {mean.points} points of the grid: geometric mean {mean.mean:.2f}, "
        f"least {mean.least:.2f} at {mean.point}"
    )


def _title(result: dict[str, Any]) -> str:
    return f"{TITLES.get(result['model'], result['model'])}, {result['precision']}"


PAGE = Page("encoder", figures.summarized, markdown, draw, headline)
