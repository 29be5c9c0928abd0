"""Run an ONNX file: by ONNX Runtime if it is installed, else by ONNX's own reference in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from turbo_tvm.artifact.manifest import PositionRule, RequestLimits
from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.onnx.inputs import OnnxInputs
from turbo_tvm.frontends.onnx.sentence import SentenceTail
from turbo_tvm.frontends.sample import ImageSample, Sample
from turbo_tvm.frontends.sentence_modules import VECTOR

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Any]  # the outputs in order


class Reference:
    """A file that can be run: a call answers inputs, by name, with outputs, by name."""

    name: str  # what computes the answers, with its version

    def __init__(self, path: Path, model: onnx.ModelProto, tail: SentenceTail | None = None):
        """Open the file. Raises UnsupportedModelError if it cannot be run.

        tail: what follows the graph in the file, and is the end of `model`.
        """
        self._tail = tail
        names = [output.name for output in model.graph.output] if tail is None else [tail.needs]
        self._run: Run
        try:
            import onnxruntime
        except ImportError:
            self.name = f"ONNX's reference {onnx.__version__}"
            self._run = _reference(path, model, names)
        else:
            self.name = f"ONNX Runtime {onnxruntime.__version__}"
            self._run = _runtime(path, names)
        self._names = names

    def __call__(self, inputs: Arrays, batch: int | None = None) -> Arrays:
        """Return the outputs.

        batch: how many requests the file takes at once, if it fixes that: the inputs are a multiple of it.
        """
        count = len(next(iter(inputs.values())))
        size = batch or count
        parts = [self._run({name: x[i : i + size] for name, x in inputs.items()}) for i in range(0, count, size)]
        outputs = [np.concatenate([np.asarray(x) for x in column]) for column in zip(*parts, strict=True)]
        answers = dict(zip(self._names, outputs, strict=True))
        return answers if self._tail is None else {VECTOR: self._tail(inputs, answers)}


def _runtime(path: Path, names: list[str]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedModelError(f"{path} is refused by ONNX Runtime: {summary(error)}") from error
    return lambda inputs: session.run(names, inputs)


def _reference(path: Path, model: onnx.ModelProto, names: list[str]) -> Run:
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{path} is compared with its own answers, and ONNX's reference cannot run it ({summary(error)}): install "
            "ONNX Runtime (pip install 'turbo-tvm[onnx]')"
        ) from error
    return lambda inputs: evaluator.run(names, inputs)


def text_sample(
    reference: Reference,
    inputs: OnnxInputs,
    limits: tuple[RequestLimits, PositionRule],
    rng: np.random.Generator,
    shape: tuple[int, int],
) -> Sample:
    """Return a ragged batch of any token ids and types, padded on the right, and the file's answers.

    Small ids, which often are special, are among the first.

    limits: what a request may hold, and how its position ids follow.
    shape: sequences, and tokens of the first, which is the longest; a file that fixes the length has its own.
    """
    (allowed, rule), (batch, longest) = limits, shape
    length = inputs.length or longest
    ids = rng.integers(0, allowed.vocab_size, (batch, length))
    ids[:, 1:2] = np.arange(batch)[:, None] % min(5, allowed.vocab_size)
    ends = rng.integers(1, length + 1, batch)
    ends[0] = length if inputs.length is None else ends[0]
    mask = (np.arange(length)[None, :] < ends[:, None]).astype(np.int64)
    types = rng.integers(0, max(allowed.type_vocab_size, 1), ids.shape)
    answers = reference(inputs.feed(ids, mask, types, rule), inputs.batch)
    return Sample(ids, mask, answers, types if allowed.type_vocab_size else None)


def image_sample(reference: Reference, inputs: OnnxInputs, rng: np.random.Generator, batch: int) -> ImageSample:
    """Return `batch` images of noise and the file's answers."""
    pixels = rng.standard_normal((batch, *(inputs.image or ()))).astype(np.float32)
    return ImageSample(pixels, reference(inputs.feed_images(pixels), inputs.batch))
