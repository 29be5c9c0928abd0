"""Compare a compiled model with the ONNX file it was compiled from, on random ragged batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbo_tvm.artifact.manifest import Manifest, RequestLimits
from turbo_tvm.frontends.onnx.file import load_file
from turbo_tvm.frontends.onnx.folder import beside
from turbo_tvm.frontends.onnx.inputs import OnnxInputs, read_inputs
from turbo_tvm.frontends.onnx.reference import Reference, image_sample, text_sample
from turbo_tvm.frontends.onnx.sentence import add_modules
from turbo_tvm.frontends.sample import ImageSample, Sample
from turbo_tvm.progress import Progress
from turbo_tvm.runtime.model import CompiledModel

_LONGEST = 512  # tokens: the file computes every padding token too


@dataclass(frozen=True)
class Agreement:
    """How well one output agrees, over all batches."""

    output: str  # its name
    difference: float  # the largest, absolute
    largest: float  # the largest value that the file gave


@dataclass(frozen=True)
class Check:
    """What a comparison found."""

    reference: str  # what computed the file's answers, with its version
    lengths: tuple[int, ...]  # tokens of every sequence or image, of all batches
    outputs: tuple[Agreement, ...]  # one per output


def check(path: Path, compiled: CompiledModel, batches: int = 4, progress: bool | None = None) -> Check:
    """Compare answers for random batches of sequences of 1 to at most 512 tokens.

    batches: how many; the first is of one sequence, each later one of two more.
    progress: whether to show progress on stderr; by default if it is a terminal.

    Raises UnsupportedModelError if the file cannot be run.
    """
    manifest = compiled.manifest
    rng = np.random.default_rng(0)
    with Progress("check", progress) as show:
        show("loading the ONNX file")
        model = load_file(path)
        inputs = read_inputs(path, model, _image_size(manifest.request_limits))
        reference = Reference(path, model, add_modules(model, inputs, beside(path).modules))
        found: dict[str, tuple[float, float]] = {}
        lengths: list[int] = []
        for number in range(batches):
            show(f"batch {number + 1} of {batches}, {reference.name}")
            sample, some = _sample(inputs, reference, manifest, rng, 1 + 2 * number)
            lengths += some
            for name, (got, wanted) in sample.pairs(compiled(**sample.inputs)).items():
                difference, largest = found.get(name, (0.0, 0.0))
                found[name] = _worse(difference, got - wanted), _worse(largest, wanted)
    return Check(reference.name, tuple(lengths), tuple(Agreement(name, *both) for name, both in found.items()))


def _image_size(limits: RequestLimits) -> tuple[int, int] | None:
    return None if limits.image is None else (limits.image.height, limits.image.width)


def _sample(
    inputs: OnnxInputs, reference: Reference, manifest: Manifest, rng: np.random.Generator, batch: int
) -> tuple[Sample | ImageSample, list[int]]:
    """Return a random batch with the file's answers, and how many tokens each of its requests has."""
    limits, batch = manifest.request_limits, batch * (inputs.batch or 1)
    if inputs.image is not None:
        images = image_sample(reference, inputs, rng, batch)
        return images, [limits.max_length] * len(images.pixels)
    longest = int(rng.integers(1, min(_LONGEST, limits.max_length) + 1))
    texts = text_sample(reference, inputs, (limits, manifest.positions), rng, (batch, longest))
    return texts, texts.mask.sum(1).tolist()


def _worse(known: float, values: np.ndarray) -> float:
    """Return the largest of all; NaN if any is."""
    return float(np.maximum(known, np.abs(values).max()))
