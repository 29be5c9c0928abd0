"""The deadline of a request to the server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deadline:
    """How long an answer may take in all, and how important it is."""

    timeout_s: float
    priority: int = 0  # higher ones go first
    started_s: float = field(default_factory=time.monotonic)  # when the time began, by `time.monotonic()`

    @property
    def remaining_s(self) -> float:
        """The seconds that remain; at least a microsecond."""
        return max(self.started_s + self.timeout_s - time.monotonic(), 1e-6)

    @property
    def passed(self) -> bool:
        """Whether no time remains."""
        return time.monotonic() > self.started_s + self.timeout_s
