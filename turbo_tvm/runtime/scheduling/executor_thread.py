"""The thread that runs one model of an engine: it takes a batch from the queue, runs and answers it, and again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turbo_tvm.errors import EngineError, TurboError
from turbo_tvm.runtime.memory.peak import PeakBytes
from turbo_tvm.runtime.scheduling import scheduler, triggers
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
from turbo_tvm.runtime.scheduling.cost_model import RefinedCost
from turbo_tvm.runtime.scheduling.engine_model import EngineModel, computed_rows
from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord
from turbo_tvm.runtime.scheduling.flight import Flight
from turbo_tvm.runtime.scheduling.request_queue import RequestQueue
from turbo_tvm.runtime.scheduling.response_cache import ResponseCache
from turbo_tvm.runtime.scheduling.triggers import Trigger

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheduling:
    """How an engine chooses its batches."""

    policy: scheduler.Policy  # what runs together
    trigger: Trigger  # when to choose
    limits: BatchLimits
    cost: RefinedCost  # what a batch is predicted to take; learns from every batch that runs


class ExecutorThread(threading.Thread):
    """A daemon thread that serves `queue` with `model` until the queue is closed and empty.

    Answers go to the futures of their requests and to `cache`. on_batch: called with the record of every batch.
    """

    def __init__(
        self,
        name: str,
        model: EngineModel,
        queue: RequestQueue,
        cache: ResponseCache,
        scheduling: Scheduling,
        on_batch: Callable[[BatchRecord], None] | None,
    ):
        super().__init__(name=name, daemon=True)
        self._model, self._queue, self._cache, self._on_batch = model, queue, cache, on_batch
        self._scheduling = scheduling

    def run(self) -> None:
        """Serve until the queue ends. A fault of the engine itself stops it: everyone who waits gets an EngineError."""
        flights: list[Flight] = []
        try:
            self._scheduling = replace(self._scheduling, limits=self._limits_of_model())
            while True:
                flights, began_s = self._queue.take(self._wait_s, self._choose)
                if not flights:
                    return
                if self._run_batch(flights):  # what the scheduler counts on is the executor's whole time
                    lengths = [flight.request.length for flight in flights]
                    self._scheduling.cost.observe(lengths, time.perf_counter() - began_s)
        except BaseException as error:  # nobody may wait for ever
            stopped = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            for flight in flights:
                self._queue.finish(flight, error=stopped)
            self._queue.close(str(stopped), drain=False)
            if not isinstance(error, Exception):
                raise

    def _limits_of_model(self) -> BatchLimits:
        """Return the engine's limits with this model's own on memory: another model's would wait for its runs."""
        model, limits = self._model, self._scheduling.limits
        if model.memory_budget is None:
            return limits
        return replace(limits, max_bytes=model.memory_budget, peak_bytes=PeakBytes(model.peak_bytes, model.manifest))

    def _wait_s(self, requests: Sequence[Request], now_s: float) -> float:
        """Return the seconds to wait before choosing."""
        how = self._scheduling
        if how.trigger is triggers.hungry:  # it looks at nothing: making limits of this moment would cost 10 us
            return 0.0
        return how.trigger(requests, how.cost, how.limits.at(now_s))

    def _choose(self, requests: Sequence[Request], now_s: float) -> list[int]:
        """Return the ids of the requests to run next."""
        if len(requests) == 1:
            return [requests[0].id]
        how = self._scheduling
        return scheduler.next_batch(requests, how.policy, how.cost, how.limits.at(now_s))

    def _run_batch(self, flights: Sequence[Flight]) -> bool:
        """Run one batch and answer it; if it fails, run each request by itself: only the guilty one gets the error.

        Returns whether it succeeded at once.
        """
        started_s = time.perf_counter()
        try:
            answers = _answers(self._model, flights)
            if len(answers) != len(flights):
                raise TurboError(f"the model gave {len(answers)} answers to {len(flights)} requests")
        except Exception as error:
            self._run_one_by_one(flights, error)
            return False
        seconds = time.perf_counter() - started_s
        lengths = [flight.request.length for flight in flights]
        rows = computed_rows(self._model.manifest, lengths)
        self._queue.record_batch(lengths, rows, seconds)
        for flight, answer in zip(flights, answers, strict=True):
            self._cache.put(flight.key, answer)
            self._queue.finish(flight, answer)
        if self._on_batch is not None:
            waited_s = tuple(started_s - flight.request.arrival_s for flight in flights)
            self._notify(BatchRecord(tuple(lengths), rows, seconds, self._scheduling.cost(lengths), waited_s))
        return True

    def _run_one_by_one(self, flights: Sequence[Flight], error: Exception) -> None:
        """Run every request of a batch that failed by itself; a request that was alone gets the error."""
        if len(flights) == 1:
            self._queue.finish(flights[0], error=error)
            return
        self._queue.count("retries", len(flights))
        for flight in flights:
            self._run_batch([flight])

    def _notify(self, record: BatchRecord) -> None:
        try:
            assert self._on_batch is not None
            self._on_batch(record)
        except Exception:  # the requests are answered: an observer's fault is not theirs
            _LOG.exception("on_batch failed")


def _answers(model: EngineModel, flights: Sequence[Flight]) -> list[Any]:
    """Return the answers to a batch, each the output that its flight asks for."""
    sequences = [flight.sequence for flight in flights]
    wanted = {flight.output for flight in flights}
    if len(wanted) == 1:
        return model.answer(sequences, wanted.pop())
    everything = model.answer(sequences, None)
    return [
        answer if flight.output is None else answer[flight.output]
        for flight, answer in zip(flights, everything, strict=True)
    ]
