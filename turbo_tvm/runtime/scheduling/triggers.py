"""Triggers: when an idle executor plans its next batch. (Fang et al., "TurboTransformers", PPoPP 2021, section 5.)

    trigger(requests, cost, limits) -> seconds to wait before planning, 0 for at once

requests: all that wait, at least one, in order of arrival. `limits.now_s` is the time. The executor asks again when a
request arrives, and at the latest when the seconds are over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
from turbo_tvm.runtime.scheduling.partition import Cost

Trigger = Callable[[Sequence[Request], Cost, BatchLimits], float]


def hungry(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> float:
    """Plan at once: an idle executor gains nothing by waiting if it cannot know what comes."""
    return 0.0


@dataclass(frozen=True)
class Lazy:
    """Wait for a fuller batch, until the oldest request has waited for `timeout_s` or the batch is full.

    A batch is full with `BatchLimits.max_batch` requests or `BatchLimits.max_tokens` tokens. Raises InputError for a
    time that is none.
    """

    timeout_s: float = 0.01
    # The objective for a request's latency. Planning does not wait beyond half of it, or beyond a deadline, counting
    # what the oldest request has waited and what a batch of all that wait is predicted to take.
    latency_s: float | None = None

    def __post_init__(self) -> None:
        if not self.timeout_s >= 0:
            raise InputError(f"timeout_s is a number of seconds from 0, not {self.timeout_s!r}")
        if self.latency_s is not None and not self.latency_s > 0:
            raise InputError(f"latency_s is a number of seconds above 0, or None, not {self.latency_s!r}")

    def __call__(self, requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> float:
        """Return the seconds to wait before planning."""
        lengths = [r.length for r in requests]
        full_batch = limits.max_batch is not None and len(lengths) >= limits.max_batch
        if full_batch or (limits.max_tokens is not None and sum(lengths) >= limits.max_tokens):
            return 0.0
        oldest, takes_s = min(r.arrival_s for r in requests), cost(lengths)
        plan_at = [oldest + self.timeout_s]
        if self.latency_s is not None:
            plan_at.append(oldest + self.latency_s / 2 - takes_s)
        plan_at += [r.deadline_s - takes_s for r in requests if r.deadline_s is not None]
        return max(0.0, min(plan_at) - limits.now_s)


TRIGGERS: dict[str, Callable[[], Trigger]] = {"hungry": lambda: hungry, "lazy": Lazy}


def trigger(name: str) -> Trigger:
    """Return the trigger of this name. Raises InputError, with the names that there are."""
    if name not in TRIGGERS:
        raise InputError(f"there is no trigger {name!r}; use one of {', '.join(TRIGGERS)}, or triggers.Lazy(...)")
    return TRIGGERS[name]()
