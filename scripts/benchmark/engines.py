"""The model in every engine. Each class builds itself or raises; all use the same number of threads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .onnx_files import OnnxFiles
from .strategies import Rectangle

Call = Callable[[], Any]
OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16"}


class NotOffered(Exception):
    """The engine does not offer what was asked; the message says what."""


class Engine:
    """A rival: answers rectangles. `details` go into the report."""

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}

    def prepare(self, rectangle: Rectangle) -> Call:
        """A call that returns last_hidden_state of the rectangle, inputs already in the engine's form."""
        raise NotImplementedError

    def compilations(self) -> int:
        """How often it has compiled so far; a call that raises this is not timed."""
        return 0


class Turbo:
    """Ours: answers the list of sequences and packs it within the timed call."""

    def __init__(self, model: Any, threads: int, precision: str):
        import turbo_tvm

        self.compiled = turbo_tvm.compile(model, threads=threads, precision=precision, progress=False)
        self.details = {"layout": self.compiled.manifest.layout, "max_batch_tokens": self.compiled.max_batch_tokens}

    def prepare(self, sequences: list[np.ndarray]) -> Call:
        return lambda: self.compiled.run(sequences)


class TorchEager(Engine):
    """The PyTorch model; in bf16 its weights are converted once, where autocast would convert at every call."""

    def __init__(self, model: Any, threads: int, precision: str):
        import torch

        super().__init__()
        torch.set_num_threads(threads)
        self._model = copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model
        self.details = {"attention": model.config._attn_implementation, "weights": str(self._model.dtype)}

    def prepare(self, rectangle: Rectangle) -> Call:
        import torch

        ids, mask = torch.from_numpy(rectangle.ids), torch.from_numpy(rectangle.mask)

        def call() -> Any:
            with torch.inference_mode():
                return self._model(input_ids=ids, attention_mask=mask).last_hidden_state

        return call


class TorchCompiled(TorchEager):
    """torch.compile with dynamic shapes; compiled once for one request and once for several."""

    def __init__(self, model: Any, threads: int, precision: str):
        import torch

        super().__init__(model, threads, precision)
        torch._dynamo.reset()
        self._model = torch.compile(self._model, dynamic=True)
        start = time.perf_counter()
        for shape in ((1, 16), (2, 16), (4, 24)):
            ids = np.ones(shape, np.int64)
            self.prepare(Rectangle(ids, ids, tuple(range(shape[0]))))()
        self.details |= {"dynamic": True, "compile_s": round(time.perf_counter() - start, 2)}

    def compilations(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]


class OnnxRuntime(Engine):
    """ONNX Runtime on the exported model, or on what its own transformer optimiser makes of it."""

    def __init__(self, files: OnnxFiles, threads: int, precision: str, optimised: bool):
        import onnxruntime

        super().__init__()
        if precision != "fp32":
            raise NotOffered(f"its CPU kernels for these operators take no {precision}")
        if optimised:
            path, self.details["fused"] = files.optimised()
        else:
            path = files.exported("sdpa")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def prepare(self, rectangle: Rectangle) -> Call:
        feeds = {"input_ids": rectangle.ids, "attention_mask": rectangle.mask}
        return lambda: self._session.run(None, feeds)[0]


class OpenVino(Engine):
    """OpenVINO with the latency hint and dynamic shapes; inputs and outputs are shared with NumPy, not copied."""

    def __init__(self, files: OnnxFiles, threads: int, precision: str):
        import openvino

        super().__init__()
        wanted = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[precision],
            "INFERENCE_NUM_THREADS": threads,
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(files.exported("eager")), "CPU", wanted)
        self.details = {name: compiled.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")}
        self.details |= {"PERFORMANCE_HINT": "LATENCY", "shared_outputs": True}
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.details["INFERENCE_PRECISION_HINT"] = used
        if used != OPENVINO_TYPES[precision]:
            raise NotOffered(f"asked for {OPENVINO_TYPES[precision]}, it computes in {used} on this machine")
        self._request = compiled.create_infer_request()

    def prepare(self, rectangle: Rectangle) -> Call:
        feeds = {"input_ids": rectangle.ids, "attention_mask": rectangle.mask}
        return lambda: self._request.infer(feeds, share_inputs=True, share_outputs=True)[0]
