"""`turbo-tvm tune --repair` and `--compact`: what can be done to logs without a model."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_tvm.cli.options import Failure


def repair_logs(logs: Path) -> None:
    """Move damaged lines aside, and say which."""
    from turbo_tvm.compiler.tuning_log import repair

    _require(logs)
    moved = repair(logs)
    for path, count in moved.items():
        click.echo(f"{path}: {count} damaged {'line' if count == 1 else 'lines'} moved to {path.name}.damaged")
    if not moved:
        click.echo(f"{logs}: no line is damaged")


def compact_logs(logs: Path) -> None:
    """Keep of every trial what it gained, not its samples, and say what that saved."""
    from turbo_tvm.tuning.compact import compact

    _require(logs)
    saved = compact(logs)
    for path, count in saved.items():
        click.echo(f"{path}: {count:,} bytes smaller")
    if not saved:
        click.echo(f"{logs}: nothing to shrink")


def _require(logs: Path) -> None:
    if not logs.is_dir():
        raise Failure(f"there is no directory of tuning logs at {logs}")
