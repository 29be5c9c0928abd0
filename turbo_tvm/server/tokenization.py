"""Tokenisation for the event loop: short texts at once, others in a thread of the model's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from turbo_tvm.errors import DeadlineError, OverloadError
from turbo_tvm.runtime.model import CompiledModel
from turbo_tvm.runtime.text import AS_THE_MODEL, Text, TextOptions
from turbo_tvm.server.deadline import Deadline
from turbo_tvm.server.metrics import ModelMetrics

_T = TypeVar("_T")

_SHORT, _FEW = 400, 8  # characters and texts that are tokenised at once: a switch of threads takes longer than they do


@dataclass(frozen=True)
class EngineRequest:
    """What the engine is asked for one sequence or image; the engine checks it."""

    ids: np.ndarray | Sequence[int]  # token ids (length,), or an image (channels, height, width)
    token_type_ids: np.ndarray | None = None  # (length,); None where the model takes none
    whole: bool = True  # whether nothing of the text was cut off


class Tokenization:
    """Tokenises for one model. At most `max_waiting` texts wait for its thread."""

    def __init__(self, name: str, model: CompiledModel, metrics: ModelMetrics, max_waiting: int):
        self._name, self._model, self._metrics, self._max_waiting = name, model, metrics, max_waiting
        if model.has_tokenizer:
            model.tokenizer.encodings(["the first text takes longest"])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"tokenizer of {name}")
        self.waiting = 0  # texts and sequences that wait for the thread, or that it has

    def close(self) -> None:
        """Stop the thread; what waits for it is dropped."""
        self._thread.shutdown(cancel_futures=True)

    async def tokenize(
        self, texts: Sequence[Text], deadline: Deadline, options: TextOptions = AS_THE_MODEL
    ) -> list[EngineRequest]:
        """Return the token ids of texts or pairs, cut at the model's longest sequence.

        Raises TurboError for what is no text and for an unknown prompt, OverloadError where too many wait,
        DeadlineError when the time is over.
        """
        started = time.perf_counter()
        listed = self._model.tokenizer.prompted(texts, options.prompt_name)
        if len(listed) <= _FEW and sum(map(_characters, listed)) <= _SHORT:
            requests = self._requests(listed, options)
        else:
            requests = await self._in_thread(len(listed), lambda: self._requests(listed, options), deadline)
        self._metrics.tokenization.observe(time.perf_counter() - started)
        return requests

    async def encodings(
        self, texts: Sequence[str], special_tokens: bool, convert: Callable[[Any], _T], deadline: Deadline
    ) -> list[_T]:
        """Return what `convert` makes of the `tokenizers.Encoding` of each text, which is not cut.

        Raises as `tokenize`.
        """
        tokenizer = self._model.tokenizer

        def work() -> list[_T]:
            return [convert(e) for e in tokenizer.whole_encodings(texts, special_tokens)]

        return await self._in_thread(len(texts), work, deadline)

    async def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool, deadline: Deadline) -> list[str]:
        """Return the texts of token ids. Raises as `tokenize`."""
        tokenizer = self._model.tokenizer

        def work() -> list[str]:
            return [tokenizer.decode(one, skip_special_tokens) for one in ids]

        return await self._in_thread(len(ids), work, deadline)

    async def _in_thread(self, count: int, work: Callable[[], _T], deadline: Deadline) -> _T:
        """Return what `work` returns in the thread. count: of its texts."""
        if self.waiting and self.waiting + count > self._max_waiting:
            raise OverloadError(
                f"{self.waiting} texts wait for the tokenizer of {self._name}, and at most "
                f"{self._max_waiting} may: send the request again later"
            )
        self.waiting += count
        try:
            working = asyncio.get_running_loop().run_in_executor(self._thread, work)
            return await asyncio.wait_for(working, deadline.remaining_s)
        except asyncio.TimeoutError:
            raise DeadlineError(f"the request was not tokenised within {deadline.timeout_s:.3g} s") from None
        finally:
            self.waiting -= count

    def _requests(self, texts: list[Text], options: TextOptions) -> list[EngineRequest]:
        types, tokenizer = self._model.manifest.request_limits.type_vocab_size > 1, self._model.tokenizer
        return [
            EngineRequest(np.array(e.ids, np.int32), tokenizer.type_ids(e) if types else None, whole=not e.overflowing)
            for e in tokenizer.encodings(texts, cut=options.cut)
        ]


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
