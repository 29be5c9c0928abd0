"""A page of results: how samples become a summary, and a summary becomes Markdown and a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from . import plots
from .results import Record, write_results


@dataclass(frozen=True)
class Page:
    """One kind of benchmark."""

    # Says in a summary's "page" which benchmark wrote it.
    kind: str
    # Makes the summary of raw samples.
    summarized: Callable[[Record], Record]
    # Makes the page from a summary and the name of the files beside it.
    markdown: Callable[[Record, str], str]
    # Draws a summary into a file, or None for a page without a picture.
    draw: Callable[[Record, Path], None] | None = None
    # Says the result in a line for the terminal.
    headline: Callable[[Record], str] | None = None


def keep(page: Page, raw: Record, path: Path) -> Record:
    """Write NAME.raw.json and NAME.json, and return the summary."""
    return write_results(path, raw, lambda record: {"page": page.kind, **page.summarized(record)})


def show(page: Page, summary: Record, path: Path, console: Console) -> None:
    """Write NAME.md and NAME.png from a summary, and say what was written."""
    written = [path.name, f"{path.stem}.md"]
    path.with_suffix(".md").write_text(page.markdown(summary, path.stem))
    if page.draw is not None:
        try:
            page.draw(summary, path.with_suffix(".png"))
            written.append(f"{path.stem}.png")
        except plots.PlotsAbsent as absent:
            console.print(str(absent), markup=False)
    headline = f"{page.headline(summary)}; " if page.headline else ""
    console.print(f"{headline}{path.parent}/: {', '.join(written)}", markup=False)


def publish(page: Page, raw: Record, path: Path, console: Console) -> None:
    """Write all four files of a benchmark that has ended."""
    show(page, keep(page, raw, path), path, console)
