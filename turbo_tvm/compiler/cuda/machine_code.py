"""From CUDA C to machine code, ahead of time: by nvcc, or by the compiler in Python packages, for each architecture.

TVM without a GPU keeps the source, and the serving machine compiles it when it loads the model, with whatever compiler
it has and with fast-math on. Here an artifact carries machine code for every architecture that it was compiled for,
made with IEEE arithmetic, and a report of what each kernel takes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from turbo_tvm import config
from turbo_tvm.artifact.manifest import DeviceKernelSpec
from turbo_tvm.compiler.cuda import nvrtc
from turbo_tvm.compiler.cuda.block_counts import BlockCounts
from turbo_tvm.compiler.cuda.nvcc import Nvcc
from turbo_tvm.compiler.cuda.nvrtc import Nvrtc
from turbo_tvm.errors import CompileError, TargetError

_PACKAGES = "take the compiler that comes in Python packages: pip install 'turbo-tvm[cuda12]'"
# ptxas trades registers for occupancy by itself, and sometimes spills a few; where it does, it is asked to use fewer.
_TRIES = ("-v", "-v,--register-usage-level=3")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class DeviceCode:
    """What a model's kernels became; empty for a CPU."""

    cubins: Mapping[str, bytes] = field(default_factory=dict)  # machine code by architecture ("sm_80")
    kernels: tuple[DeviceKernelSpec, ...] = ()  # what each takes of the GPU
    source: str = ""  # sha256 of the CUDA C


def compile_source(source: str, architectures: Sequence[str], counts: Mapping[str, BlockCounts]) -> DeviceCode:
    """Compile a CUDA source for each architecture.

    counts: what is known of its kernels, by name.

    Raises CompileError if there is no compiler or it fails, TargetError for an architecture that none knows.
    """
    if not architectures:
        return DeviceCode()
    compilers = choose_compilers(architectures)
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:

        def run(architecture: str) -> tuple[bytes, list[DeviceKernelSpec]]:
            tries = []
            for options in _TRIES:
                cubin, report = compilers[architecture].compile(source, architecture, Path(directory), options)
                tries.append((cubin, _resources(report, architecture, counts)))
                if not _spilled(tries[-1][1]):
                    break
            return min(tries, key=lambda made: _spilled(made[1]))

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            results = dict(zip(architectures, pool.map(run, architectures), strict=True))
    kernels = tuple(spec for _, specs in results.values() for spec in specs)
    cubins = {name: cubin for name, (cubin, _) in results.items()}
    return DeviceCode(cubins, kernels, hashlib.sha256(source.encode()).hexdigest())


def check_compilers(architectures: Sequence[str]) -> None:
    """Raise CompileError or TargetError unless somebody here compiles for all of these; none need anybody."""
    if architectures:
        choose_compilers(architectures)


def choose_compilers(architectures: Sequence[str]) -> dict[str, Nvcc | Nvrtc]:
    """Return who compiles for which architecture: nvcc if it can.

    Raises CompileError if there is no compiler, TargetError for an architecture that none of them knows.
    """
    path = config.nvcc()
    found: list[Nvcc | Nvrtc] = [Nvcc(path)] if path else []
    found += [packages] if (packages := nvrtc.find()) is not None else []
    if not found:
        raise CompileError(
            "no compiler for NVIDIA GPUs was found. A model is compiled with one, and runs without: "
            f"install the CUDA toolkit, 12.0 or later, its nvcc on PATH or named in TURBO_TVM_NVCC, or {_PACKAGES}"
        )
    chosen = {}
    for name in architectures:
        compiler = next((compiler for compiler in found if name in compiler.architectures()), None)
        if compiler is None:
            known = sorted({a for compiler in found for a in compiler.architectures()}, key=lambda a: int(a[3:]))
            advice = f"; for older GPUs, {_PACKAGES}" if len(found) == 1 and path and name < known[0] else ""
            raise TargetError(f"no compiler here makes code for {name!r}, only for {', '.join(known)}{advice}")
        chosen[name] = compiler
    return chosen


def _spilled(kernels: list[DeviceKernelSpec]) -> int:
    """Return the bytes of registers that kernels spill together."""
    return sum(kernel.spill_bytes for kernel in kernels)


def _resources(report: str, architecture: str, counts: Mapping[str, BlockCounts]) -> list[DeviceKernelSpec]:
    """Return what ptxas reports of each kernel, with what was counted. Raises CompileError for another report."""
    specs: list[DeviceKernelSpec] = []
    for part in report.split("Compiling entry function")[1:]:
        entry = _ENTRY.match("Compiling entry function" + part)
        spill, used = _SPILL.search(part), _USED.search(part)
        if entry is None or spill is None or used is None:
            raise CompileError(f"the assembler's report on {architecture} is not understood: {part[:300]}")
        name = entry[1].removesuffix("_kernel")
        specs.append(
            DeviceKernelSpec(
                name=name,
                architecture=architecture,
                registers=int(used[1]),
                spill_bytes=int(spill[2]) + int(spill[3]),
                static_shared_bytes=int(used[2] or 0),
                **vars(counts.get(name, BlockCounts())),
            )
        )
    return specs
