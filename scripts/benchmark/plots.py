"""The PNG of a result: latency relative to ours over the grid, throughput on the ragged sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from . import figures
from .contenders import OURS, RIVALS
from .strategies import PADDED
from .workloads import LENGTHS, RAGGED

HINT = "no plots: matplotlib is not installed; it is in the extra: pip install -e '.[bench]'"
COLOURS = dict(zip(RIVALS, ("tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:purple"), strict=True))
OUR_COLOUR = "tab:green"
DPI, MOST_PIXELS, COLOURS_IN_PNG = 66, 1300, 24
MOST_BYTES = 56_000  # a PNG in the repository is smaller than 60 KB
MARKERS = dict(zip(RIVALS, "sDo^v", strict=True))


class PlotsAbsent(Exception):
    """There is nothing to draw with; the message says what to install."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, without pyplot, which wants a display. Raises PlotsAbsent."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise PlotsAbsent(HINT) from error
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG of few colours, as large as the limit on files in the repository allows."""
    dpi = min(DPI, MOST_PIXELS / figure.get_size_inches().max())
    picture = _png(figure, dpi)
    while len(picture) > MOST_BYTES:
        dpi *= 0.9
        picture = _png(figure, dpi)
    path.write_bytes(picture)


def _png(figure: Any, dpi: float) -> bytes:
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    image = (
        Image.open(drawn).convert("RGB").quantize(COLOURS_IN_PNG, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def draw(result: dict[str, Any], path: Path, title: str) -> None:
    """Write the PNG. Raises PlotsAbsent without matplotlib."""
    batches = sorted({len(w["lengths"]) for w in figures.grid(result)})
    sets = [w for w in result["workloads"] if w["kind"] == RAGGED]
    rows = max(1, bool(batches) + bool(sets))
    figure = new_figure(15, 5 * rows)
    parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    machine = result["machine"]
    figure.suptitle(f"{title}: {machine['cpu']}, {machine['threads']} threads")
    _grid(parts[0], result, batches)
    _ragged(parts[-1], sets)
    save(figure, path)


def _grid(figure: Any, result: dict[str, Any], batches: list[int]) -> None:
    if not batches:
        return
    axes = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for name in figures.contenders(result):
            points = _ratios(result, name, batch)
            axis.plot(
                *zip(*points, strict=True), marker=MARKERS[name], color=COLOURS[name], label=name
            ) if points else None
        axis.axhline(1.0, color=OUR_COLOUR, linewidth=2, label=OURS)
        axis.set(title=f"batch {batch}", xlabel="length (tokens)")
        axis.set_xscale("log", base=2)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        _plain_log_scale(axis)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"latency / latency of {OURS}\n(above 1: {OURS} is faster)")
    _legend(figure, axes)


def _plain_log_scale(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _ratios(result: dict[str, Any], name: str, batch: int) -> list[tuple[int, float]]:
    points = []
    for workload in figures.grid(result):
        best = figures.best_rival(workload, name, PADDED)
        if len(workload["lengths"]) == batch and best is not None and best.ratio is not None:
            points.append((workload["lengths"][0], best.ratio))
    return points


def _ragged(figure: Any, sets: list[dict[str, Any]]) -> None:
    if not sets:
        return
    axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, workload in zip(axes, sets, strict=True):
        bars = _bars(workload)
        names = list(dict.fromkeys(name for name, _, _ in bars))
        for name, how, rate in bars:
            offset = {OURS: 0.0, "best": -0.2, PADDED: 0.2}[OURS if name == OURS else how]
            shade = {"color": COLOURS.get(name, OUR_COLOUR)} | ({"hatch": "//", "alpha": 0.5} if how == PADDED else {})
            label = {"best": "best strategy", PADDED: "padded"}[how]
            drawn = axis.bar(names.index(name) + offset, rate, 0.6 if name == OURS else 0.4, **shade)
            drawn.set_label(name if name == OURS else f"{name}, {label}")
            axis.bar_label(drawn, fmt=_number, fontsize=7)
        axis.set(title=workload["label"], ylabel="sequences/s")
        axis.set_xticks(
            range(len(names)), [name.replace(", ", ",\n") for name in names], rotation=30, ha="right", fontsize=8
        )
        axis.grid(axis="y", alpha=0.3)
    _legend(figure, axes)


def _bars(workload: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(contender, best or padded, sequences per second); ours has one bar."""
    count, mine = len(workload["lengths"]), figures.ours(workload)
    bars = [(OURS, "best", count / figures.seconds(mine))] if mine else []
    for name in dict.fromkeys(e["contender"] for e in figures.rivals(workload)):
        for how, best in (
            ("best", figures.best_rival(workload, name)),
            (PADDED, figures.best_rival(workload, name, PADDED)),
        ):
            bars += [(name, how, count / best.seconds)] if best else []
    return bars


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _legend(figure: Any, axes: Any) -> None:
    """One legend for all axes, to their right."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9)
