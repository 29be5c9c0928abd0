"""What every frontend returns: a Relax module and what must be known to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import tvm
from tvm import ir

from turbo_tvm.artifact.manifest import PositionRule, ProblemType, RequestLimits, TextRule
from turbo_tvm.frontends.sample import ImageSample, Sample
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.ops.inputs import InputKind, input_params, kind_of


@dataclass(frozen=True)
class Imported:
    """A model as a Relax module with symbolic batch and length."""

    name: str  # what the model is called
    model_type: str  # as its configuration has it: "bert"; "onnx" of a file
    mod: ir.IRModule  # `encode(inputs..., weights...)`; the function's attribute num_input counts the inputs
    weights: list[tvm.runtime.Tensor]  # the values of the weight parameters, in their order
    output_names: tuple[str, ...]  # one per output of the model's function
    request_limits: RequestLimits  # what a request may hold; `limits.image` is None for a model of texts
    positions: PositionRule  # how position ids follow from token ids
    parameter_count: int  # numbers in the source model
    tokenizer: str | None = None  # the text of a `tokenizer.json`
    texts: TextRule = TextRule()  # how texts become tokens beyond what the tokenizer says
    labels: tuple[str, ...] = ()  # of a classifier, by column; models that are none may have some too
    problem_type: ProblemType | None = None  # what the logits of a classifier are
    samples: tuple[Sample | ImageSample, ...] = ()  # what the compiled model must answer like the source

    @property
    def inputs(self) -> tuple[InputKind, ...]:
        """What the model's function takes before its weights, in order."""
        return inputs_of(self.mod)

    @property
    def takes_images(self) -> bool:
        """Whether requests are images, as patches, rather than texts."""
        return InputKind.PATCHES in self.inputs


def inputs_of(mod: ir.IRModule) -> tuple[InputKind, ...]:
    """Return what the the model's function of an imported module takes before its weights, in order."""
    return tuple(kind_of(p.name) for p in input_params(mod[ENCODE]))


def problem_type_in(named: Any) -> ProblemType | None:
    """Return the `problem_type` of a configuration; None for one that transformers does not know either."""
    return named if named in get_args(ProblemType) else None


def labels_in(named: Any) -> tuple[str, ...]:
    """Return the labels of a configuration's `id2label`, whose keys are numbers or strings of them; () if one lacks."""
    if not isinstance(named, Mapping):
        return ()
    found = {str(number): label for number, label in named.items()}
    labels = [label for i in range(len(found)) if isinstance(label := found.get(str(i)), str)]
    return tuple(labels) if len(labels) == len(found) else ()
