"""What the engine's queue holds: flights, and the futures of those who wait for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from turbo_tvm.errors import DeadlineError
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.scheduling.response_cache import own_copy
from turbo_tvm.runtime.scheduling.scheduler import Request


class RequestFuture(Future):
    """The answer to come. `cancel()` succeeds, and leaves the queue, until the request is taken to run."""

    leave: Callable[[RequestFuture, str], None]  # the queue's
    deadline_s: float | None = None
    submitted_s = 0.0
    shared = False
    left = False  # whether it left the queue by itself
    flight: Flight | None = None

    def cancel(self) -> bool:
        """Cancel the request if it still waits."""
        cancelled = super().cancel()
        if cancelled:
            self.leave(self, "cancelled")
        return cancelled

    def expire(self) -> None:
        """Give up on a request whose time is over, if it still waits: its result is a DeadlineError."""
        if self.claim():
            self.leave(self, "expired")
            waited = (self.deadline_s or 0.0) - self.submitted_s
            self.set_exception(
                DeadlineError(
                    f"the request was not started within {waited:.3g} s: its engine has more work than it can do"
                )
            )

    def claim(self) -> bool:
        """From here on nobody can cancel it; False if it was cancelled, or claimed before."""
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
    """One computation. request: what the policy sees of it; output: which one is asked for, None for all of them;
    running: whether an executor has taken it.
    """

    request: Request
    key: bytes
    sequence: Batch
    output: str | None = None
    waiters: list[RequestFuture] = field(default_factory=list)
    running: bool = False

    def add(self, waiter: RequestFuture) -> None:
        """One more waits for it."""
        self.waiters.append(waiter)
        deadline, mine = self.request.deadline_s, waiter.deadline_s
        if mine is not None and (deadline is None or mine < deadline):
            self.request = replace(self.request, deadline_s=mine)

    def remove(self, waiter: RequestFuture) -> None:
        """One does not wait any more: the request has the earliest deadline of the others."""
        self.waiters.remove(waiter)
        if waiter.deadline_s == self.request.deadline_s:
            deadline = min((w.deadline_s for w in self.waiters if w.deadline_s is not None), default=None)
            self.request = replace(self.request, deadline_s=deadline)
