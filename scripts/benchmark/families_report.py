"""What was measured of each family of models, and the page that says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .pages import Page
from .results import described, pairwise

OURS = "turbo_tvm"


@dataclass
class Result:
    """A family by one route, as it was measured."""

    family: str
    # "PyTorch" or "ONNX".
    route: str
    # Why it does not compile or run, or None.
    failed: str | None = None
    layout: str = ""
    # Why parts of it were not fused.
    declined: list[str] = field(default_factory=list)
    # Calls by kernel.
    kernels: dict[str, int] = field(default_factory=dict)
    compile_s: float = 0.0
    # The largest absolute difference to PyTorch.
    largest_difference: float | None = None
    # Of ours and of every rival with every strategy, in round order.
    samples_s: dict[str, list[float]] = field(default_factory=dict)


def summarized(record: dict[str, Any]) -> dict[str, Any]:
    """Return medians and ratios to ours in place of samples."""
    return {**record, "results": [_summarized(one) for one in record["results"]]}


def _summarized(one: dict[str, Any]) -> dict[str, Any]:
    samples = {name: times for name, times in one["samples_s"].items() if times}
    made = {key: value for key, value in one.items() if key != "samples_s"}
    made["times"] = [{"contender": name, "seconds": described(times)} for name, times in samples.items()]
    if OURS in samples:
        for timed in made["times"]:
            timed["ratio"] = _ratio(samples[timed["contender"]], samples[OURS])
    return made


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of the rounds' ratios, over the rounds that both ran."""
    both = min(len(theirs), len(ours))
    return pairwise(theirs[:both], ours[:both])["median"]


def ours_s(result: dict[str, Any]) -> float | None:
    """Our median time, of a summarised result."""
    return next((t["seconds"]["median"] for t in result["times"] if t["contender"] == OURS), None)


def best_rival(result: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest rival of a summarised result, and the median of the ratios, round by round, of its times to ours."""
    rivals = [t for t in result["times"] if t["contender"] != OURS and "ratio" in t]
    if not rivals:
        return None
    best = min(rivals, key=lambda t: t["seconds"]["median"])
    return best["contender"], best["ratio"]


def markdown(record: dict[str, Any], name: str = "models") -> str:
    """The page of a summary. A `note` in the record is printed above the table."""
    results = record["results"]
    m = record["machine"]
    lines = [
        "# Families of models",
        "",
        f"Written by `{record['command']}`; summary in [{name}.json]({name}.json). {m['cpu']}, {m['threads']} threads, "
        f"PyTorch {m['packages']['torch']}, ONNX Runtime {m['packages']['onnxruntime']}, revision {m['revision']}.",
        "",
        "Four layers of width 384, random weights, fp32. Difference: the largest absolute one to PyTorch, each request "
        "alone there, over mixed batches of every length from 1 to 64 and some up to 256 tokens (images: three). Time: "
        f"{record['requests']} requests of 2 to {record['longest']} "
        "tokens (four images); rivals are PyTorch and ONNX Runtime, padded, "
        "one by one and sorted in groups of 4 and 8, and the ratio is the median of the rounds' ratios of the best "
        "one's time to ours. A family that is padded compiles and is right, without the speed.",
        "",
        *([record["note"], ""] if record.get("note") else []),
        "| family | route | layout | kernels (calls) | difference | compile | time | best rival |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(r) for r in results]
    why = [f"- {_which(r)}: {reason}" for r in results for reason in r["declined"]]
    failed = [f"- {_which(r)}: {r['failed']}" for r in results if r.get("failed")]
    lines += ["", "## What a packed model is made of", ""]
    lines += [f"- {_which(r)}: {_kernel_list(r)}" for r in results if r["layout"] == "packed"]
    lines += ["", "## Padded", "", *why] if why else []
    lines += ["", "## Not compiled", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def _which(r: dict[str, Any]) -> str:
    return f"{r['family']}, {r['route']}"


def _row(r: dict[str, Any]) -> str:
    head = f"| {r['family']} | {r['route']}"
    if r.get("failed"):
        return f"{head} | failed | | | | | |"
    best, time_s, difference = best_rival(r), ours_s(r), r.get("largest_difference")
    rival = f"{best[0]}: {best[1]:.2f}x" if best else ""
    calls = f"{len(r['kernels'])} ({sum(r['kernels'].values())})"
    ours = f"{1e3 * time_s:.1f} ms" if time_s else ""
    off = "" if difference is None else f"{difference:.1e}"
    return f"{head} | {r['layout']} | {calls} | {off} | {r['compile_s']:.0f} s | {ours} | {rival} |"


def _kernel_list(r: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" + (f" x {calls}" if calls > 1 else "") for name, calls in r["kernels"].items())


PAGE = Page("families", summarized, markdown)
