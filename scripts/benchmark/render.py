"""Pages and pictures from the summaries in a directory, without measuring."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from . import (
    artifacts,
    families,
    memory_report,
    overhead,
    pages,
    report,
    scheduling,
    searches,
    server_report,
    serving_report,
    soak,
    tuning,
)
from .results import raw_path, read_summary

PAGES = {
    made.kind: made
    for made in (
        *(
            report.PAGE,
            families.PAGE,
            memory_report.PAGE,
            serving_report.PAGE,
            scheduling.PAGE,
            server_report.PAGE,
            soak.PAGE,
        ),
        *(tuning.PAGE, artifacts.PAGE, searches.PAGE, overhead.PAGE),
    )
}


def render(path: Path, console: Console) -> bool:
    """Write the page of a summary; False, and a line that says why, if the file holds none."""
    summary = read_summary(path)
    page = None if summary is None else PAGES.get(str(summary.get("page")))
    if summary is None or page is None:
        console.print(f"{path}: no results of a benchmark; left alone")
        return False
    pages.show(page, summary, path, console)
    return True


def render_directory(directory: Path, console: Console) -> int:
    """Render every summary below a directory; returns how many there were."""
    paths = sorted(directory.rglob("*.json"))
    raw = {raw_path(path) for path in paths}
    return sum([render(path, console) for path in paths if path not in raw])
