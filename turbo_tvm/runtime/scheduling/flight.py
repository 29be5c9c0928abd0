"""A flight: one computation that identical requests share (known as single-flight), and the futures of its waiters."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from turbo_tvm.errors import DeadlineError
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.scheduling.batch_limits import Request
from turbo_tvm.runtime.scheduling.response_cache import own_copy


class RequestFuture(Future):
    """The future of a request's answer. `cancel()` succeeds, and leaves the queue, until the request is run."""

    leave: Callable[[RequestFuture, str], None]  # tells the queue that this one waits no longer, and why
    deadline_s: float | None = None
    submitted_s = 0.0
    shared = False  # whether it joined the flight of an identical request
    left = False  # whether it left the queue by itself
    flight: Flight | None = None

    def cancel(self) -> bool:
        """Cancel the request if it still waits; return whether it did."""
        cancelled = super().cancel()
        if cancelled:
            self.leave(self, "cancelled")
        return cancelled

    def expire(self) -> None:
        """Give up on a request whose time is over, if it still waits: its result becomes a DeadlineError."""
        if self.claim():
            self.leave(self, "expired")
            waited = (self.deadline_s or 0.0) - self.submitted_s
            self.set_exception(
                DeadlineError(
                    f"the request was not started within {waited:.3g} s: its engine has more work than it can do"
                )
            )

    def claim(self) -> bool:
        """Make the future uncancellable; return False if it was cancelled, or claimed before."""
        with self._condition:
            return self._state == "PENDING" and self.set_running_or_notify_cancel()

    def settle(self, answer: Any, error: BaseException | None) -> None:
        """Give the waiter a copy of the answer, or the error."""
        if error is None:
            try:
                own = own_copy(answer)
            except Exception as failure:  # there may be no memory for it
                error = failure
        if error is None:
            self.set_result(own)
        else:
            self.set_exception(error)


@dataclass(eq=False)
class Flight:
    """One computation, and everyone who waits for it."""

    request: Request  # what the policy sees of it
    key: bytes  # names the sequence and the output
    sequence: Batch
    output: str | None = None  # the output that is asked for; None for all of them
    waiters: list[RequestFuture] = field(default_factory=list)
    running: bool = False  # whether an executor has taken it

    def add(self, waiter: RequestFuture) -> None:
        """Add a waiter: the request has the earliest deadline of all of them."""
        self.waiters.append(waiter)
        deadline, mine = self.request.deadline_s, waiter.deadline_s
        if mine is not None and (deadline is None or mine < deadline):
            self.request = replace(self.request, deadline_s=mine)

    def remove(self, waiter: RequestFuture) -> None:
        """Remove a waiter: the request has the earliest deadline of the others."""
        self.waiters.remove(waiter)
        if waiter.deadline_s == self.request.deadline_s:
            deadline = min((w.deadline_s for w in self.waiters if w.deadline_s is not None), default=None)
            self.request = replace(self.request, deadline_s=deadline)
