"""Targets: what `target="cpu:znver4"` means, and which CPU features the code made for it will need."""

from __future__ import annotations

import platform

import tvm
from tvm.target import codegen

from turbo_tvm.errors import TargetError
from turbo_tvm.runtime import cpu_features
from turbo_tvm.runtime.manifest import TargetSpec

_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def resolve(name: str) -> tvm.target.Target:
    """The TVM target for a name.

    "cpu" is this machine, with the features that the system lists; "cpu:<name>" any CPU of this machine's architecture
    that LLVM knows: "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:znver4", "cpu:sapphirerapids", "cpu:neoverse-n1". Raises
    TargetError for any other name.
    """
    kind, _, cpu = str(name).partition(":")
    if kind == "cuda":
        raise TargetError(f"target {name!r}: CUDA targets are not supported by this version; use a cpu target")
    if kind != "cpu" or name.endswith(":"):
        raise TargetError(
            f"unknown target {name!r}; use 'cpu' for this machine, or 'cpu:<name>' such as 'cpu:x86-64-v3'"
        )
    triple = _TRIPLES.get(platform.machine())
    if triple is None:
        raise TargetError(
            f"this machine's architecture {platform.machine()!r} is not supported (x86_64 and aarch64 are)"
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


def _this_machine(triple: str) -> tvm.target.Target:
    """The CPU that LLVM recognises, corrected by what the system says that it has.

    LLVM goes by family and model. A virtual machine may hide features of that model, or show those of a later CPU under
    an older one's number: the code may use what is there and nothing else.
    """
    known = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": codegen.llvm_get_system_cpu()})
    has, assumed = cpu_features.host_features(), set(_checkable(known))
    changes = [f"+{name}" for name in sorted(has - assumed)] + [f"-{name}" for name in sorted(assumed - has)]
    return tvm.target.Target({**known.export(), "mattr": changes}) if changes else known


def check_precision(target: tvm.target.Target, precision: str) -> None:
    """Raises TargetError if the target has no instructions for this precision."""
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
    return TargetSpec(name, _arch(target), str(target.attrs["mcpu"]), _checkable(target))  # type: ignore[arg-type]


def _arch(target: tvm.target.Target) -> str:
    return str(target.attrs["mtriple"]).split("-")[0]


def _checkable(target: tvm.target.Target) -> tuple[str, ...]:
    return cpu_features.checkable([str(f) for f in codegen.llvm_get_cpu_features(target)], _arch(target))
