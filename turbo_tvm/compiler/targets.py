"""Targets: what `target="cpu:znver4"` or `target="cuda:sm_80"` means, and what the code made for it will need."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

import tvm
from tvm.target import codegen

from turbo_tvm.artifact.manifest import TargetSpec
from turbo_tvm.errors import TargetError
from turbo_tvm.ops import formats
from turbo_tvm.runtime.device import cpu_features
from turbo_tvm.schedules.cpu.tiles import cpu_tiles
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES
from turbo_tvm.schedules.registry import Tiles

PRECISIONS = tuple(known.name for known in formats.FORMATS)
CUDA_EXAMPLE = "cuda:sm_80"
_OLDEST_GPU, _OLDEST_BF16 = 70, 80  # tensor cores; and those that know bf16
_HOST_CPU = "x86-64"  # launching kernels needs no more, and runs anywhere

_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def resolve(name: str) -> tvm.target.Target:
    """The TVM target for a name.

    "cpu" is this machine, with the features that the system lists; "cpu:<name>" any CPU of this machine's architecture
    that LLVM knows: "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:znver4", "cpu:sapphirerapids", "cpu:neoverse-n1".
    "cuda:sm_80" is an NVIDIA GPU, "cuda:sm_80,sm_90" several in one artifact. Raises TargetError for any other name.
    """
    kind, _, cpu = str(name).partition(":")
    if kind not in ("cpu", "cuda") or name.endswith(":"):
        raise TargetError(
            f"unknown target {name!r}; use 'cpu' for this machine, 'cpu:<name>' such as 'cpu:x86-64-v3', or "
            f"'cuda:<architecture>' such as '{CUDA_EXAMPLE}'"
        )
    triple = _TRIPLES.get(platform.machine())
    if triple is None:
        raise TargetError(
            f"this machine's architecture {platform.machine()!r} is not supported (x86_64 and aarch64 are)"
        )
    if kind == "cuda":
        host = _HOST_CPU if platform.machine() == "x86_64" else "generic"
        return tvm.target.Target(
            {"kind": "cuda", "arch": architectures(name)[0]}, host={"kind": "llvm", "mtriple": triple, "mcpu": host}
        )
    if not cpu:
        return _this_machine(triple)
    target = {"kind": "llvm", "mtriple": triple, "mcpu": cpu}
    if not codegen.llvm_is_valid_cpu(cpu, triple):
        raise TargetError(
            f"unknown CPU {cpu!r} in target {name!r}; LLVM knows names such as 'x86-64-v3', 'x86-64-v4', 'znver4', "
            "'sapphirerapids' on x86-64"
        )
    return tvm.target.Target(target)


@dataclass(frozen=True)
class CompileTarget:
    """What code is made for."""

    name: str  # as the user gave it
    machine: tvm.target.Target
    architectures: tuple[str, ...]  # of GPUs; none for a CPU
    tiles: Tiles  # the layout of rows and weights
    precision: str  # "fp32", "bf16" or "fp16"


def compile_target(name: str, precision: str) -> CompileTarget:
    """Return what code is made for. Raises TargetError for a target or a precision that there is not."""
    if precision not in PRECISIONS:
        raise TargetError(f"precision {precision!r} is not supported; use one of {', '.join(PRECISIONS)}")
    machine = resolve(name)
    check_precision(machine, precision)
    gpus = architectures(name)
    return CompileTarget(name, machine, gpus, CUDA_TILES if gpus else cpu_tiles(machine), precision)


def architectures(name: str) -> tuple[str, ...]:
    """The GPU architectures of a target name, oldest first; none for a CPU. Raises TargetError."""
    kind, _, listed = str(name).partition(":")
    if kind != "cuda":
        return ()
    names = [part.strip() for part in listed.split(",")]
    for part in names:
        if not re.fullmatch(r"sm_\d{2,3}", part):
            raise TargetError(
                f"unknown GPU architecture {part!r} in target {name!r}; name what `nvidia-smi --query-gpu=compute_cap "
                f"--format=csv` says, such as '{CUDA_EXAMPLE}' for 8.0, or several: 'cuda:sm_80,sm_90'"
            )
        if int(part[3:]) < _OLDEST_GPU:
            raise TargetError(
                f"target {name!r}: GPUs before sm_{_OLDEST_GPU} have no tensor cores and are not supported"
            )
    return tuple(sorted(set(names), key=lambda part: int(part[3:])))


def _this_machine(triple: str) -> tvm.target.Target:
    """The CPU that LLVM recognises, corrected by what the system says that it has.

    LLVM goes by family and model. A virtual machine may hide features of that model, or show those of a later CPU under
    an older one's number: the code may use what is there and nothing else.
    """
    known = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": codegen.llvm_get_system_cpu()})
    has, assumed = cpu_features.host_features(), set(_checkable(known))
    changes = [f"+{name}" for name in sorted(has - assumed)] + [f"-{name}" for name in sorted(assumed - has)]
    return tvm.target.Target({**known.export(), "mattr": changes}) if changes else known


def log_name(name: str) -> str:
    """The directory of a target's tuning logs: its CPU by LLVM's name, or its oldest GPU architecture."""
    return (architectures(name) or (str(resolve(name).attrs["mcpu"]),))[0]


def check_precision(target: tvm.target.Target, precision: str) -> None:
    """Raises TargetError if the target has no instructions for this precision."""
    if str(target.kind.name) == "cuda":
        if precision == "bf16" and int(str(target.attrs["arch"])[3:]) < _OLDEST_BF16:
            raise TargetError(
                f"precision 'bf16' needs a GPU from sm_{_OLDEST_BF16} on, which {target.attrs['arch']} is not: compile "
                "with precision='fp16'"
            )
        return
    if precision == "fp16":
        raise TargetError("precision 'fp16' is for GPUs; a CPU computes in 'fp32', or in 'bf16' where it can")
    if precision != "bf16":
        return
    with target:
        if not codegen.target_has_features("avx512bf16"):
            raise TargetError(
                f"precision 'bf16' needs a CPU with AVX512-BF16, which {target.attrs['mcpu']} lacks: compile with "
                "precision='fp32', or for a CPU that has it, such as target='cpu:znver4' or 'cpu:cooperlake'"
            )


def describe(name: str, target: tvm.target.Target) -> TargetSpec:
    """What the artifact records of its target: architecture, CPU and the features that loading it checks."""
    cpu = target.host if str(target.kind.name) == "cuda" else target
    return TargetSpec(name, _arch(cpu), str(cpu.attrs["mcpu"]), _checkable(cpu), architectures(name))  # type: ignore[arg-type]


def _arch(target: tvm.target.Target) -> str:
    return str(target.attrs["mtriple"]).split("-")[0]


def _checkable(target: tvm.target.Target) -> tuple[str, ...]:
    return cpu_features.checkable([str(f) for f in codegen.llvm_get_cpu_features(target)], _arch(target))
