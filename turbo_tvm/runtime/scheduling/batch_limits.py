"""A waiting request, as the scheduler sees it, and the limits on what may run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turbo_tvm.errors import InputError


@dataclass(frozen=True)
class Request:
    """A waiting request of one sequence. All times are seconds of one clock."""

    id: Any
    length: int  # tokens
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0  # higher ones run first


@dataclass(frozen=True)
class BatchLimits:
    """Limits on a batch, each of them optional, and how unfair a policy may be.

    A request that exceeds a limit by itself runs by itself. Raises InputError for a limit that is none.
    """

    max_batch: int | None = None  # sequences
    max_tokens: int | None = None  # tokens of all sequences, without padding
    max_bytes: int | None = None  # memory, as `peak_bytes` says
    # bytes that a batch of these lengths needs; must not shrink when a sequence is added
    peak_bytes: Callable[[Sequence[int]], int] | None = None
    # batches with requests that have waited this long at `now_s` run before all others, the oldest first
    max_wait_s: float | None = None
    now_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_tokens", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is at least 1, or None for no limit, not {value!r}")
        if self.max_wait_s is not None and not self.max_wait_s >= 0:
            raise InputError(f"max_wait_s is a number of seconds from 0, or None for no limit, not {self.max_wait_s!r}")
        if self.max_bytes is not None and self.peak_bytes is None:
            raise InputError("max_bytes needs peak_bytes, which says what a batch of given lengths takes")

    def at(self, now_s: float) -> BatchLimits:
        """Return the same limits at another time."""
        return replace(self, now_s=now_s)

    def allow(self, lengths: Sequence[int]) -> bool:
        """Return whether sequences of these lengths may run together; one by itself always may."""
        if len(lengths) <= 1:
            return True
        if self.max_batch is not None and len(lengths) > self.max_batch:
            return False
        if self.max_tokens is not None and sum(lengths) > self.max_tokens:
            return False
        return self.fits_memory(lengths)

    def fits_memory(self, lengths: Sequence[int]) -> bool:
        """Return whether sequences of these lengths are within the limit on bytes."""
        return self.max_bytes is None or self.peak_bytes is None or self.peak_bytes(lengths) <= self.max_bytes

    def overdue(self, request: Request) -> bool:
        """Return whether a request has waited for `max_wait_s`."""
        return self.max_wait_s is not None and self.now_s - request.arrival_s >= self.max_wait_s
