"""Measuring a machine's limits: the kernels of `limit_kernels` on TVM's thread pool, the fastest of many calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm
from tvm.target import codegen

from turbo_tvm.compiler import targets
from turbo_tvm.errors import ArtifactError
from turbo_tvm.profiling import limit_kernels
from turbo_tvm.profiling.roofline import MachineLimits
from turbo_tvm.runtime.device.cpu_features import request_amx
from turbo_tvm.runtime.device.devices import aligned_empty
from turbo_tvm.runtime.executor import BIG_CORES
from turbo_tvm.schedules.cpu import amx
from turbo_tvm.schedules.cpu.tiles import CpuTiles, cpu_tiles

DRAM_BYTES = 512 << 20
_CALL_S = 0.01  # a call this long makes the cost of calling small
_LEAST_CALLS = 3
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_BF16_HALVES = 0x3F003F00  # two bfloat16 of 0.5

Call = Callable[[int], object]  # runs a kernel for a number of rounds


@dataclass(frozen=True)
class Sample:
    """The timing of one call."""

    seconds: float  # per round
    cpus: float  # that the process had on average


@dataclass(frozen=True)
class Caches:
    """Sizes of a CPU's caches in bytes; 0 where unknown."""

    level2: int  # of one core
    last: int  # of the last level, which cores share


def measure(
    threads: int,
    cpu: str,
    tvm_version: str,
    *,
    seconds: float = 2.0,
    dram_bytes: int = DRAM_BYTES,
    step: Callable[[str], None] = print,
) -> MachineLimits:
    """Measure the limits with `threads` threads, in about `seconds` and the time to fill an array of `dram_bytes`.

    step: called with a line on what is being measured.

    Where memory is short the array takes a quarter of what is available. Other work on the machine lowers the figures.
    """
    bench = _Bench(threads, seconds / 5)
    step("measuring fp32 multiply-adds")
    fp32 = bench.fp32()
    step("measuring bf16 products")
    bf16 = bench.bf16()
    found = caches()
    step("measuring the last-level cache")
    cache = bench.cache(found)
    step("measuring memory")
    one, every = bench.dram(min(dram_bytes, _available_bytes() // 4))
    return MachineLimits(cpu, threads, tvm_version, fp32, bf16, one, every, cache, found.last, bench.cpu_share)


class _Bench:
    """The compiled kernels, and how long each may be measured."""

    def __init__(self, threads: int, seconds: float):
        self.threads, self.seconds, self.cpu_share = threads, seconds, 1.0
        target = targets.resolve("cpu")
        self.tiles = cpu_tiles(target)
        with target:
            self.has_bf16 = bool(codegen.target_has_features("avx512bf16"))
        self.has_amx = amx_granted(target)
        self.kernels = tvm.compile(module(self.tiles, self.has_bf16, self.has_amx), target=target)
        tvm.get_global_func("runtime.config_threadpool")(BIG_CORES, threads)

    def fp32(self) -> float:
        """Measure fp32 multiply-adds, in FLOP/s."""
        shape = (limit_kernels.accumulators(self.tiles), self.tiles.lanes)
        factors = np.full((2, self.tiles.lanes), 0.5, np.float32)
        return 2.0 * self._arithmetic("multiply_add", shape, factors)

    def bf16(self) -> float | None:
        """Measure bf16 products in FLOP/s, in AMX's tiles where possible; None for a CPU without the instructions."""
        if self.has_amx:
            pairs = np.full((4 * amx.ROWS, amx.PAIRS), _BF16_HALVES, np.int32)
            return 4.0 * amx.PAIRS * self._arithmetic("dot_amx", pairs.shape, pairs)
        if not self.has_bf16:
            return None
        return 4.0 * self._arithmetic("dot_bf16", (24, 16), np.full((2, 16), _BF16_HALVES, np.int32))

    def cache(self, found: Caches) -> float | None:
        """Measure reads of half the last-level cache in bytes/s; None if the caches above hold most of that."""
        size = found.last // 2
        return self._read(size, self.threads) if size > 2 * self.threads * found.level2 > 0 else None

    def dram(self, size: int) -> tuple[float, float]:
        """Measure reads of memory in bytes/s, by one thread and by all."""
        data = self._array(size)
        one = self._read_array(data, 1)
        return one, max(one, self._read_array(data, self.threads))

    def _arithmetic(self, name: str, shape: tuple[int, int], factors: np.ndarray) -> float:
        """Measure accumulator updates per second, counting each lane."""
        start = tvm.runtime.tensor(np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape))
        out, kernel, inputs = self._out(self.threads), self.kernels[name], tvm.runtime.tensor(factors)
        per_round = self._best(lambda rounds: kernel(start, inputs, out, rounds), self.threads, 1000)
        return shape[0] * shape[1] * self.threads / per_round

    def _read(self, size: int, tasks: int) -> float:
        return self._read_array(self._array(size), tasks)

    def _read_array(self, data: tvm.runtime.Tensor, tasks: int) -> float:
        out, kernel = self._out(tasks), self.kernels["read"]
        size = int(data.shape[0]) // tasks * tasks * int(data.shape[1]) * 4
        return size / self._best(lambda rounds: kernel(data, out, rounds), tasks, 1)

    def _best(self, call: Call, tasks: int, rounds: int) -> float:
        """Return the seconds per round of the fastest call, and note which part of the CPUs it had."""
        found = best(call, self.seconds, rounds)
        self.cpu_share = min(self.cpu_share, found.cpus / tasks)
        return found.seconds

    def _array(self, size: int) -> tvm.runtime.Tensor:
        block = limit_kernels.block_floats(self.tiles)
        blocks = max(size // (4 * block), self.threads)
        values = aligned_empty(blocks * block * 4).view(np.float32).reshape(blocks, block)
        values.fill(1.0)  # pages that were never written are all the same page
        return tvm.runtime.from_dlpack(values)

    def _out(self, tasks: int) -> tvm.runtime.Tensor:
        return tvm.runtime.tensor(np.zeros((tasks, self.tiles.lanes), np.float32))


def amx_granted(target: tvm.target.Target) -> bool:
    """Return whether the target has AMX's bf16 products and the system, when asked, lets this process use them."""
    spec = targets.describe("cpu", target)
    if amx.FEATURE not in spec.features:
        return False
    try:
        request_amx(spec)
    except ArtifactError:  # nothing compiled runs in tiles here, so they are not this machine's limit
        return False
    return True


def module(tiles: CpuTiles, bf16: bool, amx: bool = False) -> tvm.IRModule:
    """Return a module of the kernels for these tiles, with those for bf16 and AMX if asked."""
    functions = {"multiply_add": limit_kernels.multiply_add(tiles), "read": limit_kernels.read(tiles)}
    if bf16:
        functions["dot_bf16"] = limit_kernels.dot_bf16()
    if amx:
        functions["dot_amx"] = limit_kernels.dot_amx()
    return tvm.IRModule(functions)


def best(call: Call, seconds: float, rounds: int) -> Sample:
    """Return the fastest of at least three calls within `seconds`, each with enough rounds to be timed."""
    taken = _sample(call, rounds)
    while taken.seconds * rounds < _CALL_S:
        rounds *= 2
        taken = _sample(call, rounds)
    end, calls = time.perf_counter() + seconds, 1
    while calls < _LEAST_CALLS or time.perf_counter() < end:
        taken = min(taken, _sample(call, rounds), key=lambda sample: sample.seconds)
        calls += 1
    return taken


def caches(directory: Path = _CACHES) -> Caches:
    """Return the sizes of this CPU's caches as the system gives them."""
    sizes: dict[int, int] = {}
    for index in directory.glob("index*"):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind != "Instruction":
                sizes[int(level)] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):  # a file that is missing, or in a form that is not Linux's
            continue
    return Caches(sizes.get(2, 0), sizes.get(3, 0))


def _sample(call: Call, rounds: int) -> Sample:
    start, cpu_start = time.perf_counter(), time.process_time()
    call(rounds)
    seconds = time.perf_counter() - start
    return Sample(seconds / rounds, (time.process_time() - cpu_start) / seconds)


def _available_bytes() -> int:
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * DRAM_BYTES
