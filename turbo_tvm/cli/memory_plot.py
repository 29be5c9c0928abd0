"""The picture of `turbo-tvm inspect --memory`: time on one axis, offset on the other, one box per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from turbo_tvm.cli.pictures import save
from turbo_tvm.runtime.memory.report import MemoryReport, TensorPlace

_MB = 1e6


def draw(reports: Sequence[MemoryReport], path: Path) -> None:
    """Write the plans side by side, on one scale, as PNG or SVG by the path's suffix. Needs matplotlib.

    Raises TurboError if the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot, which wants a display and keeps state

    figure = Figure(figsize=(7.5 * len(reports), 6.5), layout="constrained")
    axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    highest = max(max(sum(r.chunks), r.peak) for r in reports)
    for ax, report in zip(axes, reports, strict=True):
        _panel(ax, report, highest)
    axes[0].set_ylabel("offset, MB")
    figure.suptitle(f"{reports[0].model}: memory between kernels, planned by {reports[0].strategy}")
    save(figure, path)


def _panel(ax: Any, report: MemoryReport, highest: int) -> None:
    starts = [0, *accumulate(report.chunks)]
    kinds = list(dict.fromkeys(_kind(t) for t in report.tensors))
    for tensor in report.tensors:
        color = f"C{kinds.index(_kind(tensor)) % 10}"
        bottom = (starts[tensor.chunk] + tensor.offset) / _MB
        width, height = tensor.last - tensor.first + 1, tensor.size / _MB
        ax.bar(tensor.first, height, width, bottom, align="edge", color=color, alpha=0.6, edgecolor="black", lw=0.5)
    for kind in kinds:
        ax.bar(0, 0, color=f"C{kinds.index(kind) % 10}", alpha=0.6, label=kind)
    for start in starts[1:-1]:
        ax.axhline(start / _MB, color="grey", lw=1, ls=":")
    if len(report.chunks) == 1:
        ax.axhline(report.peak / _MB, color="black", lw=1.2, label=f"peak {report.peak / _MB:.3g} MB")
        bound = f"lower bound {report.lower_bound / _MB:.3g} MB"
        ax.axhline(report.lower_bound / _MB, color="red", lw=1.2, ls="--", label=bound)
    ax.set(xlabel="step", xlim=(0, len(report.steps) + 1), ylim=(0, 1.05 * highest / _MB))
    lengths = ", ".join(map(str, report.lengths[:6])) + (", ..." if len(report.lengths) > 6 else "")
    ax.set_title(
        f"length {lengths}: peak {report.peak / _MB:.3g} MB, {report.ratio:.3f} x the lower bound", fontsize=10
    )
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8)


def _kind(tensor: TensorPlace) -> str:
    """Return the row's shape and dtype, by which tensors are coloured."""
    return f"{' x '.join(map(str, tensor.shape[1:]))} {tensor.dtype}"
