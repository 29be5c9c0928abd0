"""The GPU: whether there is one, building kernels for it, timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from turbo_tvm.compiler.cuda import lowering, machine_code


class NoGpu(Exception):
    """There is nothing to check; its text says why."""


@dataclass(frozen=True)
class Gpu:
    """name: as the driver says. architecture: such as "sm_80". torch_cuda: whether PyTorch can use it."""

    name: str
    architecture: str
    torch_cuda: bool

    @property
    def target(self) -> str:
        """For `turbo_tvm.compile`."""
        return f"cuda:{self.architecture}"

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it computes in."""
        return ("fp32", "fp16", "bf16") if int(self.architecture[3:]) >= 80 else ("fp32", "fp16")


def find() -> Gpu:
    """The first GPU. Raises NoGpu."""
    device = tvm.cuda(0)
    if not device.exist:
        raise NoGpu(
            "this machine has no NVIDIA GPU that TVM can use, so nothing was checked (is the driver installed?)"
        )
    import torch

    major, minor = str(device.compute_version).split(".")
    return Gpu(str(device.device_name), f"sm_{major}{minor}", torch.cuda.is_available())


def build(kernels: dict[str, Any], gpu: Gpu) -> Any:
    """Kernels by name in one module, compiled as an artifact's are: by nvcc, with IEEE arithmetic."""
    before = tvm_ffi.get_global_func("tvm_callback_cuda_compile", allow_missing=True)
    tvm_ffi.register_global_func(
        "tvm_callback_cuda_compile",
        lambda source: machine_code.compile_source(source, [gpu.architecture], {}).cubins[gpu.architecture],
        override=True,
    )
    try:
        target = tvm.target.Target({"kind": "cuda", "arch": gpu.architecture}, host={"kind": "llvm"})
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in kernels.items()})
        return tvm.compile(module, target=target, tir_pipeline=lowering.register())
    finally:
        if before is not None:
            tvm_ffi.register_global_func("tvm_callback_cuda_compile", before, override=True)


def upload(*arrays: np.ndarray) -> list[Any]:
    """Arrays on the GPU."""
    return [tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays]


def time_kernel(module: Any, name: str, arguments: Sequence[Any], rounds: int) -> list[float]:
    """Seconds per launch, in each round of enough launches for the clock."""
    function = module.jit() if hasattr(module, "jit") else module
    evaluator = function.time_evaluator(name, tvm.cuda(0), number=20, repeat=rounds)
    return list(evaluator(*arguments).results)


def time_torch(call: Callable[[], Any], rounds: int, number: int = 20) -> list[float]:
    """Seconds per call of something that PyTorch launches on its stream."""
    import torch

    call()
    samples = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / number)
    return samples


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, which waits for its answer, in rounds of one call of everyone."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    for i in range(rounds):
        names = list(calls)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - start)
    return samples


def median(samples: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(samples)
