"""The PNG of `scripts/bench memory`: bytes held over the requests of each trace, and the growth that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import new_figure, save

MB = 1e6


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG. Raises PlotsAbsent without matplotlib."""
    planned, measured = report["planned"], report["measured"]
    rows = 2 if measured else 1
    figure = new_figure(4.5 * len(planned), 4.2 * rows)
    axes = figure.subplots(rows, len(planned), squeeze=False)
    figure.suptitle(f"{report['model']}: memory between kernels, {report['machine']['cpu']}")
    for axis, (trace, by_strategy) in zip(axes[0], planned.items(), strict=True):
        for strategy, found in by_strategy.items():
            requests = report["traces"][trace]["count"]
            axis.plot(_places(requests, found["held"]), [b / MB for b in found["held"]], label=strategy, linewidth=1)
        axis.set(title=f"planned: {trace}", xlabel="request", ylim=(0, None))
    axes[0][0].set_ylabel("held, MB")
    axes[0][0].legend(fontsize=8)
    for axis, (trace, by_engine) in zip(axes[1] if measured else (), measured.items(), strict=False):
        for engine, found in by_engine.items():
            if "absent" not in found:
                growth = [(b - found["after_first"]) / MB for b in found["resident"]]
                axis.plot(_places(found["requests"], growth), growth, label=engine, linewidth=1)
        axis.set(title=f"measured: {trace}", xlabel="request")
        axis.legend(fontsize=8)
    if measured:
        axes[1][0].set_ylabel("resident memory grown by, MB")
    save(figure, path)


def _places(requests: int, curve: Sequence[float]) -> list[float]:
    """The requests that the points of a thinned curve belong to."""
    return [i * (requests - 1) / max(1, len(curve) - 1) for i in range(len(curve))]
