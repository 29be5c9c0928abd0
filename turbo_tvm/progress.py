"""Progress on stderr for work that takes seconds."""

from __future__ import annotations

import sys
import time

from rich.console import Console


class Progress:
    """A spinner that names the step under way, and a line with its time when it is done.

    >>> with Progress("compile") as show:
    ...     show("importing the model")
    """

    def __init__(self, title: str, enabled: bool | None = None):
        """title: what the spinner shows at first. enabled: None shows progress if stderr is a terminal."""
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status(title)
        self._step: str | None = None
        self._started = 0.0

    def __enter__(self) -> Progress:
        if self._enabled:
            self._status.start()
        return self

    def __call__(self, step: str) -> None:
        """Begin the next step."""
        self._finish_step()
        self._step, self._started = step, time.perf_counter()
        self._status.update(f"{step} ...")

    def note(self, text: str) -> None:
        """Say how far the step is."""
        self._status.update(f"{text} ...")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish_step()
        self._status.stop()

    def _finish_step(self) -> None:
        if self._enabled and self._step is not None:
            self._console.print(f"  {self._step}  {time.perf_counter() - self._started:.1f} s", style="dim")
