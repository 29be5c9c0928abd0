"""What was measured of each family, and the page that says it: `docs/models.md` from `docs/models.json`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

OURS = "turbo_tvm"


@dataclass
class Result:
    """A family by one route. samples_s: of ours and of every rival with every strategy, in round order."""

    family: str
    route: str
    failed: str | None = None
    layout: str = ""
    declined: list[str] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    compile_s: float = 0.0
    largest_difference: float | None = None
    samples_s: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ours_s(self) -> float | None:
        times = self.samples_s.get(OURS)
        return statistics.median(times) if times else None

    @property
    def best_rival(self) -> tuple[str, float] | None:
        """The fastest rival and the median of the ratios, round by round, of its times to ours."""
        ours = self.samples_s.get(OURS, [])
        others = {name: times for name, times in self.samples_s.items() if name != OURS and times}
        if not ours or not others:
            return None
        best = min(others, key=lambda name: statistics.median(others[name]))
        return best, statistics.median(b / a for a, b in zip(ours, others[best], strict=False))


def markdown(record: dict[str, Any]) -> str:
    """`models.md` from what was measured. A `note` in the record is printed above the table."""
    known = Result.__dataclass_fields__
    results = [Result(**{k: v for k, v in r.items() if k in known}) for r in record["results"]]
    m = record["machine"]
    lines = [
        "# Families of models",
        "",
        f"Written by `{record['command']}`; samples in [models.json](models.json). {m['cpu']}, {m['threads']} threads, "
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
    why = [f"- {r.family}, {r.route}: {reason}" for r in results for reason in r.declined]
    failed = [f"- {r.family}, {r.route}: {r.failed}" for r in results if r.failed]
    lines += ["", "## What a packed model is made of", ""]
    lines += [f"- {r.family}, {r.route}: {_kernel_list(r)}" for r in results if r.layout == "packed"]
    lines += ["", "## Padded", "", *why] if why else []
    lines += ["", "## Not compiled", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def _row(r: Result) -> str:
    if r.failed:
        return f"| {r.family} | {r.route} | failed | | | | | |"
    best = r.best_rival
    rival = f"{best[0]}: {best[1]:.2f}x" if best else ""
    calls = f"{len(r.kernels)} ({sum(r.kernels.values())})"
    ours = f"{1e3 * r.ours_s:.1f} ms" if r.ours_s else ""
    difference = "" if r.largest_difference is None else f"{r.largest_difference:.1e}"
    return f"| {r.family} | {r.route} | {r.layout} | {calls} | {difference} | {r.compile_s:.0f} s | {ours} | {rival} |"


def _kernel_list(r: Result) -> str:
    return ", ".join(f"`{name}`" + (f" x {calls}" if calls > 1 else "") for name, calls in r.kernels.items())
