"""A model that computes nothing: it notes what it is asked, waits if told to, and fails on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from turbo_tvm.artifact.manifest import Manifest, OutputSpec, PositionRule, RequestLimits, TargetSpec, TensorSpec
from turbo_tvm.errors import InputError
from turbo_tvm.runtime import validation
from turbo_tvm.runtime.batch import Batch

GUILTY = 666  # a token id: a batch with it fails


class LinearCost:
    """1 ms, and 10 us per token."""

    def __call__(self, lengths: Sequence[int]) -> float:
        return 1e-3 + 1e-5 * sum(lengths)

    def batches(self, counts: Any, tokens: Any, squares: Any, longest: Any) -> Any:
        return 1e-3 + 1e-5 * tokens


class FakeModel:
    """Answers (sum of the ids, length) as float32. gate: batches wait until it is set; seconds: what a batch takes."""

    max_batch_tokens = 8192
    fingerprint = "fake"

    def __init__(self) -> None:
        self.manifest = Manifest(
            turbo_version="0",
            tvm_version="0",
            name="fake",
            model_type="bert",
            entry="encode",
            target=TargetSpec("cpu", "x86_64", "znver4"),
            row_tile=4,
            inputs=(TensorSpec("ids", "int32", "token_ids"),),
            outputs=(OutputSpec("last_hidden_state", "token", 96),),
            primary="last_hidden_state",
            request_limits=RequestLimits(max_length=512, vocab_size=1000, type_vocab_size=2),
            positions=PositionRule("arange"),
        )
        self.memory_budget: int | None = None
        self.cost: Any = LinearCost()
        self.measured = 0
        self.gate = threading.Event()
        self.gate.set()
        self.seconds = 0.0
        self.fail: Callable[[], BaseException | None] = lambda: None
        self.batches: list[list[int]] = []
        self.seen: list[tuple[int, ...]] = []
        self.entered = threading.Semaphore(0)

    def measure_cost(self, *, say: Any) -> None:
        self.measured += 1
        self.cost = LinearCost()

    def output_name(self, asked: str | None) -> str | None:
        if asked not in (None, "last_hidden_state"):
            raise InputError(f"the model has no output {asked!r}")
        return asked or "last_hidden_state"

    def peak_bytes(self, lengths: Sequence[int]) -> int:
        return 100 * sum(lengths)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[np.ndarray], None]:
        return [np.array([ord(c) % 100 for c in text]) for text in texts], None

    def prepare(self, sequence: Any, token_type_ids: Any = None) -> Batch:
        return validation.from_sequence(sequence, token_type_ids, self.manifest.request_limits, self.manifest.positions)

    def answer(self, parts: Sequence[Batch], output: str | None = None) -> list[np.ndarray]:
        self.entered.release()
        self.gate.wait(30)
        if self.seconds:
            time.sleep(self.seconds)
        ids = [part.token_ids for part in parts]
        self.batches.append([len(one) for one in ids])
        self.seen += [tuple(one.tolist()) for one in ids]
        error = self.fail()
        if error is not None:
            raise error
        if any((one == GUILTY).any() for one in ids):
            raise ValueError("the guilty token")
        return [self.right(one) for one in ids]

    @staticmethod
    def right(ids: Any) -> np.ndarray:
        """The answer to a sequence."""
        return np.array([np.sum(ids), len(ids)], np.float32)
