"""What every frontend returns: a Relax module and what must be known to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import ir

from turbo_tvm.artifact.manifest import Bounds, PositionRule

DEFAULT_MAX_LENGTH = 512  # tokens, of models that name no limit

# Of an output's largest value: well above rounding, well below another answer.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}


@dataclass(frozen=True)
class Sample:
    """A padded batch and what the model itself answers, to hold the compiled model to.

    token_ids, mask, token_type_ids: int64 (batch, length), padding on the right. outputs: by name.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    outputs: dict[str, np.ndarray]
    token_type_ids: np.ndarray | None = None

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The arguments of the model's call."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {"input_ids": self.token_ids, "attention_mask": self.mask, **types}

    def differences(self, answers: Mapping[str, Any]) -> dict[str, float]:
        """How far each output is from the model's own, relative to its largest value; padding does not count."""
        return {name: _difference(*pair) for name, pair in self.pairs(answers).items()}

    def pairs(self, answers: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Each output as answered and as the model's own, for real tokens."""
        found = {}
        for name, wanted in self.outputs.items():
            got, real = np.asarray(answers[name]), self.mask.astype(bool)
            found[name] = (got[real], wanted[real]) if wanted.shape[:2] == real.shape else (got, wanted)
        return found


@dataclass(frozen=True)
class ImageSample:
    """The same for images: pixels fp32 (batch, channels, height, width)."""

    pixels: np.ndarray
    outputs: dict[str, np.ndarray]

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The arguments of the model's call."""
        return {"pixel_values": self.pixels}

    def differences(self, answers: Mapping[str, Any]) -> dict[str, float]:
        """How far each output is from the model's own, relative to its largest value."""
        return {name: _difference(*pair) for name, pair in self.pairs(answers).items()}

    def pairs(self, answers: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Each output as answered and as the model's own."""
        return {name: (np.asarray(answers[name]), wanted) for name, wanted in self.outputs.items()}


def labels_in(named: Any) -> tuple[str, ...]:
    """The labels in a configuration's `id2label`, whose keys are numbers or their spelling; none if one is missing."""
    if not isinstance(named, Mapping):
        return ()
    found = {str(number): label for number, label in named.items()}
    labels = [label for i in range(len(found)) if isinstance(label := found.get(str(i)), str)]
    return tuple(labels) if len(labels) == len(found) else ()


def _difference(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-6))


@dataclass(frozen=True)
class Imported:
    """A model as a Relax module with symbolic batch and length.

    mod: `main(inputs..., weights...)`, inputs `(batch, length)` int64 and named input_ids, attention_mask,
        token_type_ids, position_ids (those that the model takes); of images, patches fp32 (batch, length, columns) in
        the place of input_ids.
    weights: the values of `main`'s weight parameters, in order.
    output_names: one per output of `main`.
    tokenizer: the text of a `tokenizer.json`, if the model came with one.
    labels: of a classifier, by column; models that are none may have some too.
    sample: a batch that the compiled model must answer like the original.
    """

    name: str
    model_type: str
    mod: ir.IRModule
    weights: list[tvm.runtime.Tensor]
    output_names: tuple[str, ...]
    bounds: Bounds
    positions: PositionRule
    parameter_count: int
    tokenizer: str | None = None
    labels: tuple[str, ...] = ()
    sample: Sample | ImageSample | None = None
