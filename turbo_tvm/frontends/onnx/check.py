"""How well a compiled model agrees with the ONNX file it was compiled from, on random ragged batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbo_tvm.artifact.manifest import Bounds, Manifest
from turbo_tvm.frontends.imported import ImageSample, Sample
from turbo_tvm.frontends.onnx.file import load_file
from turbo_tvm.frontends.onnx.inputs import OnnxInputs, read_inputs
from turbo_tvm.frontends.onnx.reference import Reference, random_images, random_sample
from turbo_tvm.progress import Progress
from turbo_tvm.runtime.model import CompiledModel

_LONGEST = 512  # tokens: the file computes every padding token too


@dataclass(frozen=True)
class Agreement:
    """One output: its largest difference over all batches, absolute, and the largest value that the file gave."""

    output: str
    difference: float
    largest: float


@dataclass(frozen=True)
class Check:
    """reference: what computed the file's answers. lengths: tokens per sequence or image, of all batches."""

    reference: str
    lengths: tuple[int, ...]
    outputs: tuple[Agreement, ...]


def check(path: Path, compiled: CompiledModel, batches: int = 4, progress: bool | None = None) -> Check:
    """Compare answers for `batches` random batches of sequences of 1 to at most 512 tokens.

    Raises UnsupportedModelError if the file cannot be run.
    """
    manifest = compiled.manifest
    rng = np.random.default_rng(0)
    with Progress("check", progress) as show:
        show("loading the ONNX file")
        model = load_file(path)
        inputs, reference = read_inputs(path, model, _image_size(manifest.bounds)), Reference(path, model)
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


def _image_size(bounds: Bounds) -> tuple[int, int] | None:
    return None if bounds.image is None else (bounds.image.height, bounds.image.width)


def _sample(
    inputs: OnnxInputs, reference: Reference, manifest: Manifest, rng: np.random.Generator, batch: int
) -> tuple[Sample | ImageSample, list[int]]:
    """A random batch with the file's answers, and how many tokens each of its requests has."""
    bounds, batch = manifest.bounds, batch * (inputs.batch or 1)
    if inputs.image is not None:
        pixels = random_images(inputs, rng, batch)
        answers = reference(inputs.feed_images(pixels), inputs.batch)
        return ImageSample(pixels, answers), [bounds.max_length] * len(pixels)
    longest = int(rng.integers(1, min(_LONGEST, bounds.max_length) + 1))
    sample = random_sample(reference, inputs, bounds, manifest.positions, rng, batch, longest)
    return sample, sample.mask.sum(1).tolist()


def _worse(known: float, values: np.ndarray) -> float:
    """The largest of all; NaN if any is."""
    return float(np.maximum(known, np.abs(values).max()))
