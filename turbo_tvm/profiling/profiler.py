"""The profiler: where the time of a run goes, kernel by kernel.

The VM's hook is called before every instruction. For a kernel it calls the kernel itself between two readings of the
clock and tells the VM to skip it, so the cost of the hook before and after is not counted. The call from Python still
is: its cost is measured with the same arguments on a function that does nothing, and subtracted. A kernel's time
includes TVM's checks of its arguments and the start and end of its parallel loops.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from turbo_tvm.artifact.manifest import KernelSpec, Manifest
from turbo_tvm.errors import InputError
from turbo_tvm.profiling.roofline import KernelProfile, MachineLimits, ProfileReport, Work, floor
from turbo_tvm.runtime.executor import Executor
from turbo_tvm.runtime.random_requests import random_sequences
from turbo_tvm.runtime.validation import check_lengths

__all__ = ["KernelProfile", "MachineLimits", "ProfileReport", "check_lengths", "profile", "random_sequences"]

_WARM_UPS = 2
_CALIBRATIONS = 200
_RUN, _SKIP = 0, 1  # what a hook tells the VM
_NOT_KERNELS = ("vm.builtin.", "shape_func")  # the second computes shapes for the VM

Run = Callable[[Sequence[np.ndarray]], Any]


def profile(
    run: Run,
    executor: Executor,
    lengths: Sequence[int],
    *,
    rounds: int = 20,
    limits: MachineLimits | None = None,
    seed: int = 0,
) -> ProfileReport:
    """Profile `run`, which answers sequences on the executor, on random token ids of these lengths, or on images.

    Every round runs once as usual and once with the hook. Other threads wait meanwhile.

    Raises InputError for lengths that the model cannot answer and for fewer than one round.
    """
    if rounds < 1:
        raise InputError(f"at least one round is needed, not {rounds}")
    sequences = random_sequences(lengths, executor.manifest.request_limits, seed)
    probe = _Probe(executor)
    with executor.calling(probe):
        for _ in range(_WARM_UPS):
            run(sequences)
        probe.look(lambda: run(sequences))
        for _ in range(rounds):
            probe.round(lambda: run(sequences))
    return _report(probe, executor, tuple(lengths), limits, seed)


class _Probe:
    """Stands in for the model's function: calls it, or the same code on a VM with a hook, and keeps the times.

    calls: of each kernel in one run.
    activations: bytes of activations of each kernel in one run.
    shapes: of the token ids in each call of the VM.
    """

    def __init__(self, executor: Executor):
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        self.kernel_samples: defaultdict[str, list[float]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self.activations: Counter[str] = Counter()
        self.shapes: list[tuple[int, ...]] = []
        self._manifest = executor.manifest
        self._wait = executor.device.wait
        self._plain = self._function = executor.function
        self._vm = executor.another_vm()
        self._with_hook = self._vm[executor.manifest.entry]
        self._weights: set[int] = set()
        self._cost: dict[str, float] = {}
        self._kernel_s: defaultdict[str, float] = defaultdict(float)
        self._vm_s = 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        out = self._function(*args)
        self._wait()
        self._vm_s += time.perf_counter() - start
        return out

    def look(self, run: Callable[[], Any]) -> None:
        """Run once to count calls and bytes, and to measure what calling each kernel costs."""

        def counted(*args: Any) -> Any:
            self.shapes.append(tuple(map(int, args[0].shape)))
            self._weights = {tensor.data_ptr() for tensor in _weights_of(self._manifest, args)}
            return self._with_hook(*args)

        self._vm.set_instrument(self._count)
        self._function = counted
        run()
        self._vm.set_instrument(self._time)

    def round(self, run: Callable[[], Any]) -> None:
        """Run once as usual and once with the kernels timed."""
        run_s, vm_s = self._timed(self._plain, run)
        _, hooked_s = self._timed(self._with_hook, run)
        kernels = {name: max(self._kernel_s[name] - n * self._cost[name], 0.0) for name, n in self.calls.items()}
        for name, seconds in kernels.items():
            self.kernel_samples[name].append(seconds)
        times = {"run": run_s, "vm_call": vm_s, "kernels": sum(kernels.values()), "vm_call_hooked": hooked_s}
        for name, seconds in times.items():
            self.samples[name].append(seconds)

    def _timed(self, function: Callable[..., Any], run: Callable[[], Any]) -> tuple[float, float]:
        """Return the seconds of a run, and of its VM."""
        self._function, self._vm_s = function, 0.0
        self._kernel_s.clear()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, self._vm_s

    def _count(self, func: Any, name: str, before: bool, _result: Any, *args: Any) -> int:
        if before and is_kernel(func, name):
            self.calls[name] += 1
            self.activations[name] += _activation_bytes(args, self._weights)
            if name not in self._cost:
                self._cost[name] = _call_cost(args)
        return _RUN

    def _time(self, func: Any, name: str, before: bool, _result: Any, *args: Any) -> int:
        if not before or not is_kernel(func, name):
            return _RUN
        start = time.perf_counter()
        func(*args)
        self._wait()
        self._kernel_s[name] += time.perf_counter() - start
        return _SKIP


def is_kernel(func: Any, name: str) -> bool:
    """Return whether this is a PrimFunc, and not a part of the VM or a Relax function."""
    return isinstance(func, tvm_ffi.Function) and not name.startswith(_NOT_KERNELS)


def _weights_of(manifest: Manifest, args: Sequence[Any]) -> Sequence[Any]:
    first = len(manifest.inputs)
    return args[first : first + len(manifest.parameters)]


def _activation_bytes(args: Sequence[Any], weights: set[int]) -> int:
    """Return the bytes of a kernel's arguments that are no weights: each input tensor once, and the output."""
    last = len(args) - 1  # the output: written, also where it lies in the place of an input
    tensors = {(a.data_ptr(), i == last): a for i, a in enumerate(args) if isinstance(a, tvm.runtime.Tensor)}
    return sum(_bytes(t) for (pointer, _), t in tensors.items() if pointer not in weights)


def _bytes(tensor: tvm.runtime.Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def _call_cost(args: tuple) -> float:
    """Return the seconds for calling a function that does next to nothing with these arguments, clock included."""
    nothing = tvm.get_global_func("vm.builtin.make_tuple")
    samples = []
    for _ in range(_CALIBRATIONS):
        start = time.perf_counter()
        nothing(*args)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _report(
    probe: _Probe, executor: Executor, lengths: tuple[int, ...], limits: MachineLimits | None, seed: int
) -> ProfileReport:
    s = {name: tuple(values) for name, values in probe.samples.items()}
    return ProfileReport(
        model=executor.manifest.name,
        layout=executor.manifest.layout,
        lengths=lengths,
        threads=executor.threads,
        seed=seed,
        kernels=_kernels(probe, executor.manifest, lengths, limits),
        vm_s=max(_median_difference(s["vm_call"], s["kernels"]), 0.0),
        python_s=_median_difference(s["run"], s["vm_call"]),
        run_s=statistics.median(s["run"]),
        vm_call_s=statistics.median(s["vm_call"]),
        hook_s=_median_difference(s["vm_call_hooked"], s["vm_call"]),
        samples=s,
        limits=limits,
    )


def _median_difference(more: Sequence[float], less: Sequence[float]) -> float:
    return statistics.median(a - b for a, b in zip(more, less, strict=True))


def _kernels(
    probe: _Probe, manifest: Manifest, lengths: Sequence[int], limits: MachineLimits | None
) -> tuple[KernelProfile, ...]:
    calls, activations, shapes = probe.calls, probe.activations, probe.shapes
    specs = {spec.name: spec for spec in manifest.kernels}
    footprint = sum(k.calls * k.bytes_weights for k in manifest.kernels) + max(activations.values(), default=0)
    made = []
    for name, samples in probe.kernel_samples.items():
        spec = specs.get(name)
        work = _work(spec, manifest, lengths, shapes, activations[name], footprint) if spec else None
        least, bound = floor(name, work, limits) if work and limits else (None, None)
        family = spec.family if spec else None
        median = statistics.median(samples)
        made.append(KernelProfile(name, family, calls[name], median, tuple(samples), work, least, bound))
    return tuple(sorted(made, key=lambda kernel: -kernel.seconds))


def _work(
    spec: KernelSpec,
    manifest: Manifest,
    lengths: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    activations: int,
    footprint: float,
) -> Work:
    """Return the work of a kernel in one run.

    shapes: of the token ids in each of the run's calls of the VM, (batch, length) if padded.
    activations: bytes. footprint: as in `Work`.

    An embedding reads a row of its tables per token, not the tables: its FLOPs count those values.
    """
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    if manifest.layout == "padded":
        tokens, pairs = sum(b * n for b, n in shapes), sum(b * n * n for b, n in shapes)
    weights = float(spec.calls * len(shapes) * spec.bytes_weights)
    if spec.family == "embedding":
        width = 2.0 if manifest.precision == "bf16" else 4.0
        weights = min(weights, width * spec.calls * spec.flops_per_token * tokens)
    flops = spec.calls * (spec.flops_per_token * tokens + spec.flops_per_pair * pairs)
    return Work(flops, weights, float(activations), footprint)
