"""A model that is served: tokenizer, engine, and what asynchronous callers need of both."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from turbo_tvm.artifact.manifest import LABELLED, OutputSpec
from turbo_tvm.errors import DeadlineError, OverloadError
from turbo_tvm.runtime.model import CompiledModel
from turbo_tvm.runtime.scheduling.engine import ALL_OUTPUTS, Engine
from turbo_tvm.runtime.scheduling.engine_statistics import BatchRecord
from turbo_tvm.runtime.text import Text
from turbo_tvm.server import errors
from turbo_tvm.server.errors import Problem
from turbo_tvm.server.live import Live
from turbo_tvm.server.metrics import ModelMetrics
from turbo_tvm.server.settings import Settings

_T = TypeVar("_T")

_TURN = 64  # submissions at a time: each takes tens of microseconds of the event loop
_PAUSE_S = 0.005  # of a request that is larger than the room in the queue
_MOST_VALUES = 64 << 20  # of an answer: 256 MB, and several times that in JSON
_LONGEST = 64  # characters per token, beyond which a text is not looked at
_SHORT, _FEW = 400, 8  # characters and texts that are tokenised at once: a turn of threads takes longer than they do


@dataclass(frozen=True)
class Tokens:
    """One request for the engine, which checks it; ids may be an image too.

    token_type_ids: None where the model takes none; whole: nothing was cut off.
    """

    ids: np.ndarray | Sequence[int]
    token_type_ids: np.ndarray | None = None
    whole: bool = True


@dataclass(frozen=True)
class Patience:
    """How long an answer may take in all, and how important it is: higher ones go first. since: `time.monotonic()`."""

    timeout_s: float
    priority: int = 0
    since: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """What remains, in seconds; at least a microsecond."""
        return max(self.since + self.timeout_s - time.monotonic(), 1e-6)

    @property
    def over(self) -> bool:
        """Whether nothing remains."""
        return time.monotonic() > self.since + self.timeout_s


class ServedModel:
    """A compiled model with its engine. Made and closed in a thread, used from the event loop."""

    def __init__(self, name: str, model: CompiledModel, settings: Settings, metrics: ModelMetrics):
        self.name, self.model = name, model
        self.metrics, self.live = metrics, Live()
        if model.has_tokenizer:
            model.tokenizer.encodings(["the first text takes longest"])
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"tokenizer of {name}")
        self._timeout_s = settings.timeout_s
        self._untokenized = 0  # texts and sequences that wait for the tokenizer, or that it has
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
        """Answer what waits, and stop."""
        self.engine.close(drain=drain)
        self._tokenizing.shutdown(cancel_futures=True)

    @property
    def has_tokenizer(self) -> bool:
        """Whether it takes texts."""
        return self.model.has_tokenizer

    @property
    def takes_text(self) -> bool:
        """Whether its requests are token ids, and not images."""
        return self.model.manifest.bounds.image is None

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.model.manifest.bounds.max_length

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """What it can answer."""
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
        """Of its scores; numbered, as transformers does, where the model names none."""
        spec = self.scores
        return self.model.manifest.labels or tuple(f"LABEL_{i}" for i in range(spec.columns if spec else 0))

    @property
    def token_rows(self) -> OutputSpec | None:
        """The output with a vector per token, if there is one."""
        return next((spec for spec in self.outputs if spec.kind == "token"), None)

    def _main(self, kind: str) -> OutputSpec | None:
        primary = self.model.manifest.primary
        return next((spec for spec in self.outputs if spec.name == primary and spec.kind == kind), None)

    async def tokenize(self, texts: Sequence[Text], patience: Patience) -> list[Tokens]:
        """Token ids of texts or pairs, cut at the model's longest sequence; off the event loop, but for short ones.

        Raises TurboError; OverloadError where as many wait as the engine lets wait, DeadlineError in time.
        """
        started = time.perf_counter()
        listed = list(texts)
        if len(listed) <= _FEW and sum(map(_characters, listed)) <= _SHORT:
            found = self._tokens(listed)
        else:
            found = await self._off_loop(len(listed), lambda: self._tokens(listed), patience)
        self.metrics.tokenization.observe(time.perf_counter() - started)
        return found

    async def encodings(
        self, texts: Sequence[str], special_tokens: bool, spell: Callable[[Any], _T], patience: Patience
    ) -> list[_T]:
        """What `spell` makes of the tokenizer's own encodings, which are whole."""
        tokenizer = self.model.tokenizer

        def work() -> list[_T]:
            return [spell(e) for e in tokenizer.encodings(texts, special_tokens=special_tokens, truncate=False)]

        return await self._off_loop(len(texts), work, patience)

    async def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool, patience: Patience) -> list[str]:
        """The texts of token ids."""
        tokenizer = self.model.tokenizer

        def work() -> list[str]:
            return [tokenizer.decode(one, skip_special_tokens) for one in ids]

        return await self._off_loop(len(ids), work, patience)

    async def tokenized(self) -> None:
        """Return when the engine has all requests, of a model that gets no more of them; or in time."""
        give_up = time.monotonic() + self._timeout_s
        while self._untokenized and time.monotonic() < give_up:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)  # they are submitted

    async def _off_loop(self, count: int, work: Callable[[], _T], patience: Patience) -> _T:
        """What the tokenizer's thread makes of so many texts."""
        if self._untokenized and self._untokenized + count > self.engine.max_queue:
            raise OverloadError(
                f"{self._untokenized} texts wait for the tokenizer of {self.name}, and at most "
                f"{self.engine.max_queue} may: send the request again later"
            )
        self._untokenized += count
        try:
            working = asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
            return await asyncio.wait_for(working, patience.left_s)
        except asyncio.TimeoutError:
            raise DeadlineError(f"the request was not tokenised within {patience.timeout_s:.3g} s") from None
        finally:
            self._untokenized -= count

    def _tokens(self, texts: list[Text]) -> list[Tokens]:
        types, longest = self.model.manifest.bounds.type_vocab_size > 1, _LONGEST * self.max_length
        cut = [_cut(text, longest) for text in texts]
        return [
            Tokens(
                np.array(e.ids, np.int32),
                np.array(e.type_ids, np.int32) if types else None,
                whole=not e.overflowing and _characters(text) <= longest,
            )
            for text, e in zip(texts, self.model.tokenizer.encodings(cut), strict=True)
        ]

    async def answer(self, requests: Sequence[Tokens], patience: Patience, output: str | None = None) -> list[Any]:
        """The answers, in order; if one fails or nobody waits any more, what still waits of the others is cancelled.

        output: which one, by default the main one; the engine's ALL_OUTPUTS for all. Raises TurboError; DeadlineError
        in time.
        """
        self._check_size(requests, output)
        futures: list[Future] = []
        try:
            for number, one in enumerate(requests, 1):
                if number % _TURN == 0:
                    await asyncio.sleep(0)  # others have their turn
                futures.append(await self._submitted(one, patience, output, futures))
            await _settled(futures, patience)
        except BaseException:
            for future in reversed(futures):  # those with the earliest deadline last: the engine looks for it anew
                future.cancel()
            raise
        return [future.result() for future in futures]

    async def _submitted(self, one: Tokens, patience: Patience, output: str | None, before: Sequence[Future]) -> Future:
        """In the queue, where there is room or will be, because others of the same request wait in it."""
        while True:
            try:
                return self.engine.submit(
                    one.ids,
                    token_type_ids=one.token_type_ids,
                    timeout_s=patience.left_s,
                    priority=patience.priority,
                    output=output,
                )
            except OverloadError:
                if all(future.done() for future in before) or patience.over:
                    raise
            await asyncio.sleep(_PAUSE_S)

    def _check_size(self, requests: Sequence[Tokens], output: str | None) -> None:
        """Raises Problem for more values than an answer may have."""
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
        self.live.batch(record)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _cut(text: Text, longest: int) -> Text:
    """As much of a text, or of each of a pair, as can matter."""
    return text[:longest] if isinstance(text, str) else (text[0][:longest], text[1][:longest])


async def _settled(futures: Sequence[Future], patience: Patience) -> None:
    """Return when all of them are done, or one has failed. Raises DeadlineError, when no time is left.

    One call into the loop for all of them: asyncio's own way makes one per future.
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
        timer = loop.call_later(patience.left_s, wake)
        try:
            await done
        finally:
            timer.cancel()
    for future in futures:
        if future.done() and not future.cancelled() and (error := future.exception()) is not None:
            raise error
    if not all(future.done() for future in futures):
        raise DeadlineError(f"the request was not answered within {patience.timeout_s:.3g} s: its answer is dropped")
