"""A batch with the answers that the source model itself gives: what a compiled model is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbo_tvm.ops.inputs import InputKind

# How far a compiled model may be from its source, relative to an output's largest value, by precision: well above
# rounding, well below another answer.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}

_SHORTEST = 16  # tokens; small batches are longer than what is shorter

Arrays = dict[str, np.ndarray]


def spread_lengths(longest: int) -> list[int]:
    """Return lengths, in tokens, at which a model is compared beside a small batch: the longest, then ever a quarter.

    A model may be another one from some number of tokens on: attention in blocks, angles of positions that are scaled.
    All of them together are a third more tokens than the longest.
    """
    lengths = [longest]
    while lengths[-1] // 4 >= _SHORTEST:
        lengths.append(lengths[-1] // 4)
    return lengths


@dataclass(frozen=True)
class Sample:
    """A padded batch of texts and the source model's answers."""

    token_ids: np.ndarray  # int64 (batch, length), padding on the right
    mask: np.ndarray  # int64 (batch, length), 1 for tokens, 0 for padding
    outputs: Arrays  # the answers by output: (batch, length, ...) or (batch, ...)
    token_type_ids: np.ndarray | None = None  # int64 (batch, length), of models that take them

    @property
    def size(self) -> str:
        """How large it is, for messages."""
        return f"{len(self.mask)} sequence(s) of at most {self.mask.shape[1]} tokens"

    @property
    def inputs(self) -> Arrays:
        """The arguments of the model's call."""
        given = {InputKind.TOKEN_IDS: self.token_ids, InputKind.ATTENTION_MASK: self.mask}
        if self.token_type_ids is not None:
            given[InputKind.TOKEN_TYPE_IDS] = self.token_type_ids
        return {kind.parameter: values for kind, values in given.items()}

    def differences(self, answers: Mapping[str, Any]) -> dict[str, float]:
        """Return how far each output is from the source's, relative to its largest value; padding does not count."""
        return {name: _difference(*pair) for name, pair in self.pairs(answers).items()}

    def pairs(self, answers: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return each output as answered and as the source's, for real tokens alone."""
        found = {}
        for name, wanted in self.outputs.items():
            got, real = np.asarray(answers[name]), self.mask.astype(bool)
            found[name] = (got[real], wanted[real]) if wanted.shape[:2] == real.shape else (got, wanted)
        return found


@dataclass(frozen=True)
class ImageSample:
    """A batch of images and the source model's answers."""

    pixels: np.ndarray  # fp32 (batch, channels, height, width)
    outputs: Arrays  # the answers by output: (batch, length, ...) or (batch, ...)

    @property
    def size(self) -> str:
        """How large it is, for messages."""
        return f"{len(self.pixels)} images"

    @property
    def inputs(self) -> Arrays:
        """The arguments of the model's call."""
        return {InputKind.PIXELS.parameter: self.pixels}

    def differences(self, answers: Mapping[str, Any]) -> dict[str, float]:
        """Return how far each output is from the source's, relative to its largest value."""
        return {name: _difference(*pair) for name, pair in self.pairs(answers).items()}

    def pairs(self, answers: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return each output as answered and as the source's."""
        return {name: (np.asarray(answers[name]), wanted) for name, wanted in self.outputs.items()}


def _difference(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-6))
