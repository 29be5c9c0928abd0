"""The engine: answers requests from many producers in batches that the scheduler chooses. `turbo_tvm.Engine`.

    submit -> response cache -> queue -> trigger, policy -> executor thread -> model -> every waiter's future

An `executor_thread` per model plans, runs a batch, answers it, and plans again with whatever has come meanwhile; TVM
releases the interpreter lock inside kernels, so producers go on. `scheduler` and `triggers` choose, `request_queue`
keeps who waits, `cost_model` predicts.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

from turbo_tvm.errors import DeadlineError, EngineError, InputError
from turbo_tvm.progress import Progress
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.scheduling import scheduler, triggers
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits
from turbo_tvm.runtime.scheduling.cost_model import RefinedCost
from turbo_tvm.runtime.scheduling.engine_model import EngineModel, checked_models
from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord, EngineStatistics
from turbo_tvm.runtime.scheduling.executor_thread import ExecutorThread, Scheduling
from turbo_tvm.runtime.scheduling.flight import RequestFuture
from turbo_tvm.runtime.scheduling.partition import Cost
from turbo_tvm.runtime.scheduling.request_queue import PLANNED, RequestQueue
from turbo_tvm.runtime.scheduling.response_cache import ResponseCache, request_key
from turbo_tvm.runtime.scheduling.triggers import Trigger
from turbo_tvm.runtime.text import is_text

MAX_BATCH = 64
MAX_WAIT_S = 1.0
CACHE_BYTES = 32 << 20
LONGEST_TIMEOUT_S = 1e9
ALL_OUTPUTS = "*"


class Engine:
    """Serves a compiled model to any number of threads and coroutines.

    >>> with turbo_tvm.Engine(model) as engine:          # or `async with`
    ...     vector = engine.infer_sync([101, 7592, 102])  # or `await engine.infer(...)`, or `engine.submit(...)`
    """

    def __init__(
        self,
        models: EngineModel | Sequence[EngineModel],
        *,
        policy: str = "dp",
        trigger: str | Trigger = "hungry",
        max_batch: int = MAX_BATCH,
        max_tokens: int | None = None,
        max_wait_s: float | None = MAX_WAIT_S,
        max_queue: int = 1024,
        cache: int | ResponseCache = CACHE_BYTES,
        output: str | None = None,
        cost: Cost | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
        progress: bool | None = None,
    ):
        """models: one model, or several of the same artifact, each loaded by itself: a thread runs each of them.
        policy: how batches are chosen, see `scheduler`: "dp", "dp_latency", "deadline", "token_budget", "naive" or
            "nobatch".
        trigger: when: "hungry", whenever a model is idle; "lazy", or a `triggers.Lazy`, to wait for fuller batches.
        max_batch, max_tokens: sequences and tokens of a batch; by default 64, and what the model runs at once. Its
            `memory_budget`, as it is when the engine starts, is a limit too.
        max_wait_s: a request that has waited this long goes first, whatever the policy; None for no such bound.
        max_queue: requests that may wait; a further one raises OverloadError.
        cache: bytes of answers that are kept, 0 for none; or a ResponseCache that engines share.
        output: which output is answered; by default the model's main one.
        cost: `cost(lengths) -> seconds`; by default the model's own, which is measured at the start if it is not known.
        on_batch: called with the record of every batch, in the thread that ran it: it must be quick.
        progress: whether to show the measuring on stderr; by default if that is a terminal.

        Raises InputError.
        """
        self._models = checked_models(models)
        first = self._models[0]
        self._policy = scheduler.policy(policy)
        self._trigger = triggers.trigger(trigger) if isinstance(trigger, str) else trigger
        self._output = first.output_name(output)
        self._prefixes: dict[str | None, bytes] = {}
        tokens = first.max_batch_tokens if max_tokens is None else max_tokens
        self._limits = BatchLimits(_whole("max_batch", max_batch), _whole("max_tokens", tokens), max_wait_s=max_wait_s)
        self._queue = RequestQueue(_whole("max_queue", max_queue), planned=max(PLANNED, max_batch))
        self._cache = cache if isinstance(cache, ResponseCache) else ResponseCache(cache)
        self._given_cost, self._on_batch, self._progress = cost, on_batch, progress
        self._threads: list[ExecutorThread] = []
        self._state = threading.Lock()

    @property
    def statistics(self) -> EngineStatistics:
        """The counts and histograms since the start."""
        return self._queue.statistics()

    @property
    def cost(self) -> RefinedCost:
        """What the engine predicts a batch to cost by now, in seconds. Raises EngineError before `start`."""
        if not self._threads:
            raise self._not_running()
        return self._cost

    @property
    def limits(self) -> BatchLimits:
        """The limits on a batch."""
        return self._limits

    @property
    def waiting(self) -> int:
        """How many requests wait in the queue."""
        return len(self._queue)

    @property
    def max_queue(self) -> int:
        """How many requests may wait."""
        return self._queue.max_queue

    def start(self) -> Engine:
        """Measure what batches cost if that is not known, which takes seconds, and begin to answer."""
        with self._state:
            if self._threads:
                raise EngineError("the engine was started before: make another one")
            self._cost = RefinedCost(self._measured() if self._given_cost is None else self._given_cost)
            names = (f"turbo_tvm engine {i}" for i in range(len(self._models)))
            scheduling = Scheduling(self._policy, self._trigger, self._limits, self._cost)
            self._threads = [
                ExecutorThread(name, model, self._queue, self._cache, scheduling, self._on_batch)
                for model, name in zip(self._models, names, strict=True)
            ]
            for thread in self._threads:
                thread.start()
            atexit.register(self._at_exit)
        return self

    def close(self, *, drain: bool = True) -> None:
        """Accept nothing more, and return when all that waits is answered.

        Without `drain`, only the batches that run are answered; what waits gets an EngineError.
        """
        self._queue.close("the engine is closed: start another one", drain=drain and bool(self._threads))
        if threading.current_thread() not in self._threads:  # a future's callback may close the engine, and not wait
            for thread in self._threads:
                thread.join()
        atexit.unregister(self._at_exit)

    def submit(
        self,
        request: Any,
        *,
        token_type_ids: Any = None,
        timeout_s: float | None = None,
        priority: int = 0,
        output: str | None = None,
    ) -> RequestFuture:
        """Queue a request; returns at once with the future of its answer.

        request: a text, a pair of texts, or the token ids of one sequence, integers (length,).
        token_type_ids: integers of the same shape; with token ids only.
        timeout_s: a request that has not started after this many seconds never runs: its result is a DeadlineError.
        priority: higher ones go first.
        output: which output to answer, by default the engine's; ALL_OUTPUTS for all of them, as a ModelOutput.

        The future can be cancelled until it starts. Its answer, fp32 (columns,) or (length, hidden), is the caller's
        own. Raises InputError for what the model cannot answer, OverloadError for a full queue, EngineError for an
        engine that does not run.
        """
        if not self._threads:
            raise self._not_running()
        sequence = self._prepared(request, token_type_ids)
        deadline_s = _deadline(timeout_s)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InputError(f"priority is a whole number, higher ones go first, not {priority!r}")
        wanted = self._output if output is None else self._named(output)
        key = request_key(self._prefix(wanted), sequence)
        known = self._cache.get(key)
        if known is not None:
            return self._queue.answered(known)
        return self._queue.submit(key, sequence, deadline_s, priority, wanted)

    def infer_sync(self, request: Any, *, timeout_s: float | None = None, **options: Any) -> Any:
        """Wait for the answer to a request and return it: see `submit`. Raises DeadlineError after `timeout_s`."""
        if threading.current_thread() in self._threads:
            raise EngineError(
                "infer_sync was called from a future's callback, where it would wait for itself: use submit"
            )
        future = self.submit(request, timeout_s=timeout_s, **options)
        try:
            return future.result(timeout_s)
        except DeadlineError:
            raise
        except (TimeoutError, FutureTimeoutError):
            return _given_up(future)
        except BaseException:
            future.cancel()  # an interrupt, for one
            raise

    async def infer(self, request: Any, *, timeout_s: float | None = None, **options: Any) -> Any:
        """Return the answer to a request to a coroutine: see `submit`. Cancelling it cancels the request."""
        future = self.submit(request, timeout_s=timeout_s, **options)
        waiting = asyncio.wrap_future(future)
        if timeout_s is None:
            return await waiting
        try:
            await asyncio.wait({waiting}, timeout=timeout_s)
            return waiting.result() if waiting.done() else _given_up(future)
        finally:
            waiting.cancel()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> Engine:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, kind: object, *_: object) -> None:
        await asyncio.to_thread(partial(self.close, drain=kind is None))

    def _named(self, output: str) -> str | None:
        return None if output == ALL_OUTPUTS else self._models[0].output_name(output)

    def _prefix(self, output: str | None) -> bytes:
        """Return the part of a cache key that names the model and the output."""
        known = self._prefixes.get(output)
        if known is None:
            known = f"{self._models[0].fingerprint}\n{output or ALL_OUTPUTS}\n".encode()
            self._prefixes[output] = known
        return known

    def _prepared(self, request: Any, token_type_ids: Any) -> Batch:
        if is_text(request):
            if token_type_ids is not None:
                raise InputError("a text brings its own token_type_ids: give them with token ids only")
            ids, types = self._models[0].tokenize([request])
            request, token_type_ids = ids[0], types and types[0]
        return self._models[0].prepare(request, token_type_ids)

    def _measured(self) -> Cost:
        model = self._models[0]
        if model.cost is None:
            with Progress("engine", self._progress) as show:
                show("measuring what batches cost")
                model.measure_cost(say=show.note)
        return model.cost

    @staticmethod
    def _not_running() -> EngineError:
        return EngineError("the engine does not run: use `with Engine(model) as engine`, or call start()")

    def _at_exit(self) -> None:
        self.close(drain=False)


def _given_up(future: RequestFuture) -> Any:
    """Give up on a request whose time is over: return an answer that came just now, else raise DeadlineError."""
    future.expire()
    if future.done():
        return future.result()
    raise DeadlineError("the time was over while the request ran: its answer is dropped")


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is a whole number from 1, not {value!r}")
    return value


def _deadline(timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise InputError(
            f"timeout_s is a number of seconds above 0, up to {LONGEST_TIMEOUT_S:.0g}, or None, not {timeout_s!r}"
        )
    return time.perf_counter() + timeout_s
