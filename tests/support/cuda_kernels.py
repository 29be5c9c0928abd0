"""CUDA kernels in the SIMT executor, and how far their results may be off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import simt
import tvm

from turbo_tvm.compiler.cuda import lowering

DTYPES = ("float32", "float16", "uint16")  # uint16: the bits of bf16
LENGTHS = (1, 7, 31, 32, 33, 64, 127, 128, 500, 768, 1024, 3072, 4099)
ROWS = (1, 3, 17, 64)
ULP = {"float32": 2.0**-23, "float16": 2.0**-10, "uint16": 2.0**-7}  # of the numbers from 1 to 2
TINY = {"float32": 2.0**-126, "float16": 2.0**-24, "uint16": 2.0**-126}  # what rounding near 0 may cost
TARGET = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in that format."""
    if dtype == "uint16":
        return np.asarray(values).astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.asarray(values).astype(dtype)


def loaded(rows: np.ndarray) -> np.ndarray:
    """What is stored there, in float64."""
    return (rows.view(ml_dtypes.bfloat16) if rows.dtype == np.uint16 else rows).astype(np.float64)


def allowed(expected: np.ndarray, dtype: str, error: float | np.ndarray = 0.0) -> np.ndarray:
    """How far a result may be off: half a unit in the last place of its format, and the error before it was rounded."""
    return ULP[dtype] / 2 * np.abs(expected) + TINY[dtype] + error * (1 + ULP[dtype])


class Gpu:
    """The executor, with kernels of this process."""

    def __init__(self, device: simt.Device):
        self.device = device

    def build(self, kernels: dict[str, tvm.tirx.PrimFunc], stock: bool = False) -> Any:
        """Kernels by name, in one module: compiling them together is quicker. stock: by TVM's own pipeline."""
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in kernels.items()})
        return tvm.compile(module, target=TARGET, tir_pipeline="default" if stock else lowering.register())

    def run(self, module: Any, name: str, inputs: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray:
        """What a kernel makes of `out`, whose bytes are all set before: what it must not touch keeps them."""
        out = np.full(out.view(np.uint8).shape, 0xFF, np.uint8).view(out.dtype).reshape(out.shape)
        tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in (*inputs, out)]
        self.device.reset()
        module[name](*tensors)
        return tensors[-1].numpy()

    def counts(self) -> simt.Counts:
        """Of the last run."""
        return self.device.counts()
