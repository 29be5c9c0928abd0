"""A model of the server: its tokenizer and engine, for callers in the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from turbo_tvm.artifact.manifest import LABELLED, OutputSpec
from turbo_tvm.errors import DeadlineError, OverloadError
from turbo_tvm.runtime.model import CompiledModel
from turbo_tvm.runtime.scheduling.engine import ALL_OUTPUTS, Engine
from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord
from turbo_tvm.server import errors
from turbo_tvm.server.dashboard import Dashboard
from turbo_tvm.server.deadline import Deadline
from turbo_tvm.server.errors import Problem
from turbo_tvm.server.metrics import ModelMetrics
from turbo_tvm.server.settings import Settings
from turbo_tvm.server.tokenization import EngineRequest, Tokenization

_TURN = 64  # submissions between two pauses: each takes tens of microseconds of the event loop
_PAUSE_S = 0.005  # that a request waits before it tries again, if it is larger than the room in the queue
_MOST_VALUES = 64 << 20  # of an answer: 256 MB, and several times that in JSON


class ModelService:
    """A compiled model with its engine and tokenizer. Made and closed in a thread, used from the event loop."""

    def __init__(self, name: str, model: CompiledModel, settings: Settings, metrics: ModelMetrics):
        self.name, self.model = name, model
        self.metrics, self.dashboard = metrics, Dashboard()
        self.tokenization = Tokenization(name, model, metrics, settings.max_queue)
        self._timeout_s = settings.timeout_s
        self.engine = Engine(
            model,
            policy=settings.policy,
            max_batch=settings.max_batch,
            max_tokens=settings.max_tokens,
            max_queue=settings.max_queue,
            cache=settings.cache_bytes,
            on_batch=self._note,
        ).start()
        self.started = time.time()

    def close(self, *, drain: bool = True) -> None:
        """Stop the engine and the tokenizer; with `drain`, when what waits is answered."""
        self.engine.close(drain=drain)
        self.tokenization.close()

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model takes texts."""
        return self.model.has_tokenizer

    @property
    def takes_text(self) -> bool:
        """Whether requests are token ids, and not images."""
        return self.model.manifest.request_limits.image is None

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.model.manifest.request_limits.max_length

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The outputs of the model."""
        return self.model.manifest.outputs

    @property
    def embedding(self) -> OutputSpec | None:
        """The output with one vector per request; None for classifiers and for models that give a row per token."""
        found = self._main("sequence")
        return found if found is not None and found.name != LABELLED else None

    @property
    def scores(self) -> OutputSpec | None:
        """The output with a score per label; None for models that are no classifiers of sequences."""
        found = self._main("sequence")
        return found if found is not None and found.name == LABELLED else None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its scores; numbered, as transformers does, where the model names none."""
        spec = self.scores
        return self.model.manifest.labels or tuple(f"LABEL_{i}" for i in range(spec.columns if spec else 0))

    @property
    def token_rows(self) -> OutputSpec | None:
        """The output with a vector per token, if there is one."""
        return next((spec for spec in self.outputs if spec.kind == "token"), None)

    def _main(self, kind: str) -> OutputSpec | None:
        primary = self.model.manifest.primary
        return next((spec for spec in self.outputs if spec.name == primary and spec.kind == kind), None)

    async def tokenized(self) -> None:
        """Wait until the engine has all requests of a model that gets no more, or the time-out is over."""
        deadline = Deadline(self._timeout_s)
        while self.tokenization.waiting and not deadline.passed:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)  # in which those that were tokenised are submitted

    async def answer(
        self, requests: Sequence[EngineRequest], deadline: Deadline, output: str | None = None
    ) -> list[Any]:
        """Return the answers, in order. If one fails or the caller is cancelled, those that still wait are cancelled.

        output: the name of the one to answer, by default the main one; the engine's ALL_OUTPUTS for all.

        Raises TurboError if one fails, DeadlineError when the time is over, Problem for an answer that is too large.
        """
        self._check_size(requests, output)
        futures: list[Future] = []
        try:
            for number, one in enumerate(requests, 1):
                if number % _TURN == 0:
                    await asyncio.sleep(0)  # lets other requests go on
                futures.append(await self._submitted(one, deadline, output, futures))
            await _settled(futures, deadline)
        except BaseException:
            for future in reversed(futures):  # the earliest deadline last: at each the engine looks for the next
                future.cancel()
            raise
        return [future.result() for future in futures]

    async def _submitted(
        self, one: EngineRequest, deadline: Deadline, output: str | None, before: Sequence[Future]
    ) -> Future:
        """Submit one, waiting for room in the queue as long as others of the same request wait in it."""
        while True:
            try:
                return self.engine.submit(
                    one.ids,
                    token_type_ids=one.token_type_ids,
                    timeout_s=deadline.remaining_s,
                    priority=deadline.priority,
                    output=output,
                )
            except OverloadError:
                if all(future.done() for future in before) or deadline.passed:
                    raise
            await asyncio.sleep(_PAUSE_S)

    def _check_size(self, requests: Sequence[EngineRequest], output: str | None) -> None:
        """Raise Problem for more values than an answer may have."""
        name = output or self.model.manifest.primary
        rows = sum(len(one.ids) for one in requests) if self.takes_text else len(requests) * self.max_length
        values = sum(
            spec.columns * (rows if spec.kind == "token" else len(requests))
            for spec in self.outputs
            if name in (None, ALL_OUTPUTS, spec.name)
        )
        if values > _MOST_VALUES:
            raise Problem(
                errors.TOO_LARGE, f"the answer would have {values:,} values, at most {_MOST_VALUES:,} go: ask for less"
            )

    def _note(self, record: BatchRecord) -> None:
        self.metrics.batch(record)
        self.dashboard.batch(record)


async def _settled(futures: Sequence[Future], deadline: Deadline) -> None:
    """Wait until all of them are done. Raises the error of one that failed, and DeadlineError when no time is left.

    This makes one call into the loop for all of them; asyncio's own way makes one per future.
    """
    loop = asyncio.get_running_loop()
    done, lock, left = loop.create_future(), threading.Lock(), len(futures)

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    def settled(future: Future) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last or (not future.cancelled() and future.exception() is not None):
            loop.call_soon_threadsafe(wake)

    if not all(future.done() for future in futures):  # answers from the cache are
        for future in futures:
            future.add_done_callback(settled)
        timer = loop.call_later(deadline.remaining_s, wake)
        try:
            await done
        finally:
            timer.cancel()
    for future in futures:
        if future.done() and not future.cancelled() and (error := future.exception()) is not None:
            raise error
    if not all(future.done() for future in futures):
        raise DeadlineError(f"the request was not answered within {deadline.timeout_s:.3g} s: its answer is dropped")
