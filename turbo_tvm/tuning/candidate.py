"""A kernel with a setting: built into a library, checked against the default and timed beside it.

What runs in a worker process: functions of plain arguments, so that a candidate which crashes or hangs takes nobody
along. `build` needs the compiler; `measure` loads two libraries, here or through a TVM RPC session on another machine,
and runs both in turn on the same arrays. A small batch is bound by reading weights, which in a model come from memory:
they are put out of the caches before every run then (TVM's `cache_flush_cpu_non_first_arg`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import ir

from turbo_tvm import config
from turbo_tvm.compiler import targets
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.errors import WrongAnswersError
from turbo_tvm.ops import formats
from turbo_tvm.runtime.device.cpu_features import request_amx
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.tuning.operands import arrays

NAME = "kernel"
FLUSH = "cache_flush_cpu_non_first_arg"
TOLERANCES = {formats.FP32: 1e-4, formats.FP16: 1e-2, formats.BF16: 3e-2}  # of the largest value

_LEAST_PAIRS, _MOST_PAIRS = 5, 15
_LONG_S = 0.03  # a call of which fewer samples must do
_HOPELESS = 0.7  # of the default's speed: no further samples


@dataclass(frozen=True)
class Remote:
    """A machine that is behind a TVM RPC tracker."""

    host: str
    port: int
    key: str


@dataclass(frozen=True)
class Effort:
    """seconds: to spend on a bucket; threads: of the kernel; seed: of the numbers it works on."""

    seconds: float = 0.2
    threads: int = 1
    seed: int = 0


def gains(seconds: Mapping[int, Sequence[Sequence[float]]]) -> dict[int, float]:
    """How much faster the candidate is than the default, by the rows of the bucket.

    The lesser of two measures, because a busy machine fools either: the median of default / candidate over the pairs,
    and the best default over the best candidate.
    """
    return {rows: _gain(pairs) for rows, pairs in seconds.items()}


def _gain(pairs: Sequence[Sequence[float]]) -> float:
    best_default, best_candidate = (min(pair[i] for pair in pairs) for i in (0, 1))
    return min(statistics.median(a / b for a, b in pairs), best_default / best_candidate)


def build(recipe_text: str, variants: tuple[Variant, ...], target_name: str, path: str) -> None:
    """Build the kernel with these variants, none for the default, into a library at `path`."""
    target = targets.resolve(target_name)
    kernel = KernelRecipe.from_json(recipe_text).build((), variants)
    executable = tvm.compile(ir.IRModule({NAME: kernel.with_attr("global_symbol", NAME)}), target=target)
    executable.export_library(path)


def measure(
    recipe_text: str,
    default_path: str,
    candidate_path: str,
    batches: Sequence[Sequence[int]],
    effort: Effort,
    remote: Remote | None = None,
) -> dict[int, list[list[float]]]:
    """Seconds of both in turn, for every batch, by its rows. TuningError where the candidate's answers are wrong."""
    session = _session(KernelRecipe.from_json(recipe_text).device, effort.threads, remote)
    default, candidate = session.load(default_path), session.load(candidate_path)
    found: dict[int, list[list[float]]] = {}
    for lengths in batches:
        call = _call(session, recipe_text, tuple(lengths), effort.seed)
        _check(call, default, candidate)
        found[sum(lengths)] = _time(call, default, candidate, effort.seconds)
    return found


class _Session:
    """Where kernels run: this process, or one on another machine."""

    def __init__(self, device: str, threads: int, remote: Remote | None):
        config.let_tvm_use_every_core()
        self._remote = None
        if remote is not None:
            tracker = tvm.rpc.connect_tracker(remote.host, remote.port)
            self._remote = tracker.request(remote.key)
            self._there: dict[str, Any] = {}  # a library that is loaded must not be overwritten
            self.device = self._remote.cuda(0) if device == "cuda" else self._remote.cpu(0)
            set_threads = self._remote.get_function("runtime.config_threadpool")
        else:
            request_amx(targets.describe("cpu", targets.resolve("cpu")))
            self.device = tvm.cuda(0) if device == "cuda" else tvm.cpu(0)
            set_threads = tvm.get_global_func("runtime.config_threadpool")
        if device == "cpu":
            set_threads(1, threads)

    def load(self, path: str) -> Any:
        if self._remote is None:
            return tvm.runtime.load_module(path)
        name = Path(path).name
        if name not in self._there:
            self._remote.upload(path)
            self._there[name] = self._remote.load_module(name)
        return self._there[name]

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, device=self.device)


@lru_cache(maxsize=1)
def _session(device: str, threads: int, remote: Remote | None) -> _Session:
    """The worker's: a remote machine is held as long as the worker lives."""
    return _Session(device, threads, remote)


@dataclass(frozen=True)
class _Call:
    """A kernel's arguments on a machine."""

    session: _Session
    arguments: tuple[Any, ...]
    out: Any  # what it writes when it is timed
    shape: tuple[int, ...]  # of the output
    stored: formats.Format  # of the output
    bound_by_weights: bool  # whether weights are most of its bytes

    def answer(self, module: Any) -> np.ndarray:
        """Return what a kernel gives; NaN where it writes nothing."""
        tensor = self.session.tensor(np.full(self.shape, _NAN[self.stored], self.stored.storage))
        module[NAME](*self.arguments, tensor)
        return _as_float(tensor.numpy(), self.stored)

    def seconds(self, module: Any, number: int) -> float:
        """Return the seconds of one run, after one that is not timed."""
        flush = FLUSH if self.bound_by_weights else ""
        timer = module.time_evaluator(NAME, self.session.device, number=number, repeat=1, f_preproc=flush)
        return float(f"{timer(*self.arguments, self.out).mean:.4g}")


_NAN: dict[formats.Format, Any] = {formats.BF16: 0x7FC0, formats.FP32: np.nan, formats.FP16: np.nan}


@lru_cache(maxsize=8)
def _call(session: _Session, recipe_text: str, lengths: tuple[int, ...], seed: int) -> _Call:
    """Return the same call for every candidate of a kernel."""
    recipe = KernelRecipe.from_json(recipe_text)
    made = arrays(recipe, lengths, seed)
    tensors: dict[int, Any] = {}
    for array in made.arguments:  # one that occurs twice is one tensor
        if id(array) not in tensors:
            tensors[id(array)] = session.tensor(array)
    stored = formats.of_storage(recipe.operator.out.dtype) or formats.FP32
    arguments = tuple(tensors[id(array)] for array in made.arguments)
    flushed = made.bound_by_weights and recipe.device == "cpu"
    return _Call(session, arguments, session.tensor(made.out), made.out.shape, stored, flushed)


def _check(call: _Call, default: Any, candidate: Any) -> None:
    """TuningError unless both give the same answers."""
    expected, got = call.answer(default), call.answer(candidate)
    largest = float(np.nanmax(np.abs(expected), initial=0.0))
    allowed = TOLERANCES[call.stored] * max(largest, 1e-6)
    if not np.allclose(got, expected, rtol=0, atol=allowed, equal_nan=True):
        off = float(np.nanmax(np.abs(got - expected), initial=0.0))
        raise WrongAnswersError(f"wrong answers: off by {off:.3g}, allowed are {allowed:.3g}")


def _as_float(array: np.ndarray, stored: formats.Format) -> np.ndarray:
    if stored == formats.BF16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _time(call: _Call, default: Any, candidate: Any, limit_s: float) -> list[list[float]]:
    """Pairs of seconds, for about so long; which of the two is first alternates."""
    once = call.seconds(default, 1)
    number = 1 if call.bound_by_weights else max(1, int(1e-3 / max(once, 1e-7)))
    least = _LEAST_PAIRS if once < _LONG_S else _LEAST_PAIRS - 2
    pairs: list[list[float]] = []
    while len(pairs) < least or (len(pairs) < _MOST_PAIRS and _spent(pairs, number) < limit_s):
        if len(pairs) % 2 == 0:
            of_default = call.seconds(default, number)
            pairs.append([of_default, call.seconds(candidate, number)])
        else:
            of_candidate = call.seconds(candidate, number)
            pairs.append([call.seconds(default, number), of_candidate])
        if len(pairs) == least and max(a / b for a, b in pairs) < _HOPELESS:
            break
    return pairs


def _spent(pairs: Sequence[Sequence[float]], number: int) -> float:
    """Seconds, with the warm-up that a time evaluator makes by itself."""
    return sum(sum(pair) for pair in pairs) * (number + 1)
