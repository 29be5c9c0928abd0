"""The picture of `turbo-tvm profile --plot`: kernels under the machine's roofs."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from turbo_tvm.cli.pictures import save
from turbo_tvm.profiling.roofline import MachineLimits, ProfileReport

_MARKERS = "osD^vP*X"
_NARROWEST = (0.25, 256.0)  # FLOPs per byte that are always shown


def draw(report: ProfileReport, path: Path) -> None:
    """Write the roofline as PNG or SVG, by the path's suffix. Needs matplotlib and a report with limits.

    Kernels without FLOPs have no place in it. Raises TurboError if the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot, which wants a display and keeps state

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.add_subplot()
    points = [(k.name, k.intensity, k.flops_per_s) for k in report.kernels if k.intensity and k.flops_per_s]
    _roofs(axes, report.limits, [x for _, x, _ in points])
    for (name, intensity, rate), marker in zip(points, cycle(_MARKERS), strict=False):
        axes.plot(
            intensity, rate / 1e9, marker, markersize=9, alpha=0.8, label=name
        )  # beside them, names would overlap
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axes.set_title(f"{report.model}, {report.tokens:,} tokens, threads: {report.threads}")
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def _roofs(axes: Any, limits: MachineLimits | None, intensities: list[float]) -> None:
    if limits is None:
        return
    peaks = {"fp32": limits.fp32_flops, "bf16": limits.bf16_flops}
    slopes = {"memory": limits.dram, "last-level cache": limits.cache}
    highest = max(peak for peak in peaks.values() if peak)
    ends = (min(_NARROWEST[0], *intensities), max(_NARROWEST[1], highest / limits.dram, *intensities))
    for name, slope in slopes.items():
        if slope:
            xs = (ends[0], highest / slope)
            axes.plot(xs, [x * slope / 1e9 for x in xs], label=f"{name}, {slope / 1e9:.0f} GB/s")
    for name, peak in peaks.items():
        if peak:
            start = peak / (limits.cache or limits.dram)
            axes.plot((start, ends[1] * 2), [peak / 1e9] * 2, "--", label=f"{name}, {peak / 1e9:,.0f} GFLOP/s")
