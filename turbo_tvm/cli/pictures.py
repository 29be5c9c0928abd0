"""Pictures of the command line: checking that one can be drawn, and writing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turbo_tvm.cli.options import Failure
from turbo_tvm.errors import TurboError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURES = (".png", ".svg")


def check_plot(plot: Path | None) -> None:
    """Raise a usage error or a Failure where a picture cannot be drawn to this path, before anything long begins."""
    if plot is None:
        return
    if plot.suffix not in _PICTURES:
        raise click.UsageError(f"--plot {plot}: the name must end in .png or .svg")
    if not plot.resolve().parent.is_dir():
        raise Failure(f"cannot write {plot}: there is no directory {plot.resolve().parent}; create it first")
    if not can_plot():
        raise Failure("--plot needs matplotlib: pip install 'turbo-tvm[plot]'")


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the path's suffix. Raises TurboError if the file cannot be written."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise TurboError(f"cannot write {path}: {error.strerror or error}") from error
