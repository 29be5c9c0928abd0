"""Markdown and PNG beside a JSON of results."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from . import figures, plots, report
from .results import read

OTHERS = ("serving", "scheduling")  # which have pages of their own


def render(path: Path, console: Console) -> bool:
    """Write both; False, and a line that says why, if the file holds no results."""
    result = read(path)
    if result is None:
        console.print(f"{path}: no results of this benchmark; left alone")
        return False
    path.with_suffix(".md").write_text(report.markdown(result, path.stem))
    title = f"{report.TITLES.get(result['model'], result['model'])}, {result['precision']}"
    written = [path.name, path.with_suffix(".md").name]
    try:
        plots.draw(result, path.with_suffix(".png"), title)
        written.append(path.with_suffix(".png").name)
    except plots.PlotsAbsent as absent:
        console.print(str(absent), markup=False)
    console.print(f"{title}: {_headline(result)}; {path.parent}/: {', '.join(written)}")
    return True


def render_directory(directory: Path, console: Console) -> int:
    """Render every JSON of results in a directory; returns how many there were."""
    paths = (path for path in sorted(directory.glob("*.json")) if path.stem not in OTHERS)
    return sum([render(path, console) for path in paths])


def _headline(result: dict) -> str:
    mean = figures.grid_mean(result)
    if mean is None:
        return "no ratios over the grid"
    return (
        f"best rival / ours over {mean.points} points of the grid: geometric mean {mean.mean:.2f}, "
        f"least {mean.least:.2f} at {mean.point}"
    )
