"""What an ONNX file answers itself: by ONNX Runtime if it is installed, else by ONNX's own reference in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.onnx_inputs import OnnxInputs
from turbo_tvm.runtime.manifest import Bounds

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Any]  # the outputs in order


class Reference:
    """Calling it answers inputs by name with outputs by name. name: what computes them, with its version."""

    def __init__(self, path: Path, model: onnx.ModelProto):
        names = [output.name for output in model.graph.output]
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

    def __call__(self, inputs: Arrays) -> Arrays:
        """The outputs."""
        return dict(zip(self._names, map(np.asarray, self._run(inputs)), strict=True))


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


def random_batch(
    inputs: OnnxInputs, bounds: Bounds, rng: np.random.Generator, batch: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a ragged mask, int64, padded on the right; of the shape that the file fixes, if it does."""
    batch, length = inputs.batch or batch, inputs.length or length
    ids = rng.integers(min(5, bounds.vocab_size - 1), bounds.vocab_size, (batch, length))
    ends = rng.integers(1, length + 1, batch)
    if batch > 1 and inputs.length is None:
        ends[0] = length
    return ids, (np.arange(length)[None, :] < ends[:, None]).astype(np.int64)


def random_images(inputs: OnnxInputs, rng: np.random.Generator, batch: int) -> np.ndarray:
    """Images of noise, fp32 (batch, channels, height, width); as many as the file fixes, if it does."""
    return rng.standard_normal((inputs.batch or batch, *(inputs.image or ()))).astype(np.float32)
