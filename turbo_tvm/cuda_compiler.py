"""From CUDA C to machine code, ahead of time: nvcc, once per architecture.

TVM without a GPU keeps the source, and the serving machine compiles it when it loads the model, with whatever compiler
it has and with fast-math on. Here an artifact carries machine code for every architecture that it was compiled for,
made with IEEE arithmetic, and a report of what each kernel takes.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from turbo_tvm import config
from turbo_tvm.device_counts import BlockCounts
from turbo_tvm.errors import CompileError, TargetError
from turbo_tvm.runtime.manifest import DeviceKernelSpec

_FLAGS = ["-O3", "-std=c++17", "-cubin", "-Xptxas"]
# ptxas trades registers for occupancy by itself, and sometimes spills a few; where it does, it is asked to use fewer.
_TRIES = ("-v", "-v,--register-usage-level=3")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class DeviceCode:
    """Machine code by architecture ("sm_80"), what its kernels take, and the sha256 of its source; none for a CPU."""

    cubins: Mapping[str, bytes] = field(default_factory=dict)
    kernels: tuple[DeviceKernelSpec, ...] = ()
    source: str = ""


def compile_source(source: str, architectures: Sequence[str], counts: Mapping[str, BlockCounts]) -> DeviceCode:
    """Compile a CUDA source for each architecture. counts: what is known of its kernels.

    Raises CompileError if nvcc is missing or fails, TargetError for an architecture that it does not know.
    """
    nvcc = config.nvcc()
    check_architectures(architectures)
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:
        path = Path(directory) / "kernels.cu"
        path.write_text(source)

        def run(architecture: str) -> tuple[bytes, list[DeviceKernelSpec]]:
            tries = []
            for options in _TRIES:
                cubin, report = _nvcc(nvcc, path, architecture, options)
                tries.append((cubin, _resources(report, architecture, counts)))
                if not _spilled(tries[-1][1]):
                    break
            return min(tries, key=lambda made: _spilled(made[1]))

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            results = dict(zip(architectures, pool.map(run, architectures), strict=True))
    kernels = tuple(spec for _, specs in results.values() for spec in specs)
    cubins = {name: cubin for name, (cubin, _) in results.items()}
    return DeviceCode(cubins, kernels, hashlib.sha256(source.encode()).hexdigest())


def check_architectures(architectures: Sequence[str]) -> None:
    """TargetError for an architecture that nvcc cannot compile for."""
    known = known_architectures(config.nvcc())
    for name in architectures:
        if name not in known:
            old = " (CUDA 13 dropped sm_70: use the nvcc of a CUDA 12 toolkit)" if name < known[0] else ""
            raise TargetError(f"nvcc cannot compile for {name!r}; it knows {', '.join(known)}{old}")


@lru_cache(maxsize=4)
def known_architectures(nvcc: str) -> tuple[str, ...]:
    """What a compiler can make machine code for, oldest first."""
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{nvcc} does not run: {(done.stderr or done.stdout).strip()[:500]}")
    names = {name for name in done.stdout.split() if re.fullmatch(r"sm_\d+", name)}
    return tuple(sorted(names, key=lambda name: int(name[3:])))


def _spilled(kernels: list[DeviceKernelSpec]) -> int:
    return sum(kernel.spill_bytes for kernel in kernels)


def _nvcc(nvcc: str, source: Path, architecture: str, options: str) -> tuple[bytes, str]:
    cubin = source.with_name(f"{architecture}.cubin")
    command = [nvcc, *_FLAGS, options, f"-arch={architecture}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"nvcc failed for {architecture}: {done.stderr.strip()[:2000]}")
    return cubin.read_bytes(), done.stderr


def _resources(report: str, architecture: str, counts: Mapping[str, BlockCounts]) -> list[DeviceKernelSpec]:
    """What ptxas says of each kernel, and what was counted."""
    specs: list[DeviceKernelSpec] = []
    for part in report.split("Compiling entry function")[1:]:
        entry = _ENTRY.match("Compiling entry function" + part)
        spill, used = _SPILL.search(part), _USED.search(part)
        if entry is None or spill is None or used is None:
            raise CompileError(f"nvcc's report on {architecture} is not understood: {part[:300]}")
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
