"""CPU features of this machine, in LLVM's names, so that code it cannot run is never started; permission to use AMX.

The operating system's list is the source (`flags` or `Features` in /proc/cpuinfo): what the processor offers
and the system enables. A machine with several kinds of core has the features that all of them have.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

from turbo_tvm.artifact.manifest import TargetSpec
from turbo_tvm.errors import ArtifactError, TargetError

__all__ = [
    "check_host",
    "checkable",
    "cpu_name",
    "host_arch",
    "host_features",
    "machine_name",
    "missing",
    "request_amx",
]

CPUINFO = Path("/proc/cpuinfo")

_NAMED_BY = ("model name", "cpu family", "model", "CPU implementer", "CPU part")  # x86-64, then Arm

_ARCHES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_FLAGS_KEY = {"x86_64": "flags", "aarch64": "Features"}

# LLVM name -> name in /proc/cpuinfo, for the features that instruction selection can use. System instructions
# (xsave, pku, rdseed, ...) are left out: no kernel of ours has them, virtual machines hide them, and the LLVM
# entry of a CPU lists them, so that requiring them would refuse good machines.
_RENAMED = {
    "x86_64": {
        "sse3": "pni",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
        "sahf": "lahf_lm",
        "lzcnt": "abm",
        "bmi": "bmi1",
        "pclmul": "pclmulqdq",
        "sha": "sha_ni",
        "avxvnni": "avx_vnni",
        "avxvnniint8": "avx_vnni_int8",
        "avxvnniint16": "avx_vnni_int16",
        "avxneconvert": "avx_ne_convert",
        "avxifma": "avx_ifma",
        "avx512vbmi2": "avx512_vbmi2",
        "avx512vnni": "avx512_vnni",
        "avx512bitalg": "avx512_bitalg",
        "avx512vpopcntdq": "avx512_vpopcntdq",
        "avx512vp2intersect": "avx512_vp2intersect",
        "avx512bf16": "avx512_bf16",
        "avx512fp16": "avx512_fp16",
        "amx-tile": "amx_tile",
        "amx-int8": "amx_int8",
        "amx-bf16": "amx_bf16",
        "amx-fp16": "amx_fp16",
        "amx-complex": "amx_complex",
    },
    "aarch64": {
        "fp-armv8": "fp",
        "neon": "asimd",
        "fullfp16": "asimdhp",
        "fp16fml": "asimdfhm",
        "dotprod": "asimddp",
        "rdm": "asimdrdm",
        "complxnum": "fcma",
        "jsconv": "jscvt",
        "rcpc": "lrcpc",
        "lse": "atomics",
        "crc": "crc32",
        "sve-aes": "sveaes",
    },
}
_SAME_NAME = {
    "x86_64": "cmov cx8 cx16 mmx sse sse2 ssse3 sse4a popcnt movbe avx avx2 f16c fma fma4 xop tbm bmi2 adx "
    "aes vaes vpclmulqdq gfni avx512f avx512bw avx512cd avx512dq avx512vl avx512ifma avx512vbmi",
    "aarch64": "aes sha2 sha3 sve sve2 bf16 i8mm sme sme2 frintts",
}
_TABLE = {arch: renamed | {name: name for name in _SAME_NAME[arch].split()} for arch, renamed in _RENAMED.items()}

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # x86-64's call; ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


def host_arch() -> str:
    """This machine's architecture: "x86_64", "aarch64", or what the system calls it where it is neither."""
    machine = platform.machine().lower()
    return _ARCHES.get(machine, machine)


def host_features(cpuinfo: str | None = None, arch: str | None = None) -> frozenset[str]:
    """Return the LLVM names of the features that this machine has.

    cpuinfo: the text of /proc/cpuinfo; by default it is read.
    arch: "x86_64" or "aarch64"; by default this machine's.

    Raises TargetError where they cannot be found out: not Linux, no such file, another architecture.
    """
    arch = arch or host_arch()
    if arch not in _TABLE:
        raise TargetError(f"CPU architecture {arch!r} is not supported: use an x86_64 or aarch64 machine")
    flags = _flags(_cpuinfo() if cpuinfo is None else cpuinfo, _FLAGS_KEY[arch])
    return frozenset(name for name, flag in _TABLE[arch].items() if flag in flags)


def checkable(features: Iterable[str], arch: str) -> tuple[str, ...]:
    """Return the features that a machine can be checked for, sorted, which an artifact records.

    The others are tuning flags ("fast-movbe") and system instructions that generated code never has.
    """
    return tuple(sorted(set(features) & _TABLE.get(arch, {}).keys()))


def missing(required: Iterable[str], cpuinfo: str | None = None, arch: str | None = None) -> tuple[str, ...]:
    """Return the required features that this machine lacks, sorted. A name that cannot be checked counts as lacking.

    Raises TargetError where something is required and the machine's features cannot be found out.
    """
    wanted = set(required)
    return tuple(sorted(wanted - host_features(cpuinfo, arch))) if wanted else ()


def check_host(target: TargetSpec, cpuinfo: str | None = None, arch: str | None = None) -> None:
    """Raise ArtifactError, with what it lacks, if this machine cannot run code compiled for `target`.

    Raises TargetError if that cannot be found out.
    """
    arch = arch or host_arch()
    if arch != target.triple_arch:
        raise ArtifactError(
            f"the artifact was compiled for {target.triple_arch} (target {target.name!r}), but this machine "
            f'is {arch}: compile the model again with target="cpu" on this machine'
        )
    lacking = missing(target.features, cpuinfo, arch)
    if lacking:
        portable = ' or with target="cpu:x86-64-v3"' if arch == "x86_64" else ""
        raise ArtifactError(
            f"the artifact was compiled for {target.name!r} ({target.mcpu}), and this machine's CPU lacks "
            f'{", ".join(lacking)}: compile the model again with target="cpu" on this machine{portable}'
        )


def request_amx(target: TargetSpec, syscall: Callable[..., int] | None = None) -> None:
    """Ask Linux to let this process use AMX's tiles, if the target has them; asking again does no harm.

    Without permission the first such instruction kills the process. It holds for every thread, later ones too.
    syscall: the system's by default, which sets `ctypes.get_errno()`. Raises ArtifactError if it is refused.
    """
    if "amx-tile" not in target.features:
        return
    call = syscall or ctypes.CDLL(None, use_errno=True).syscall
    if call(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))) == 0:
        return
    raise ArtifactError(
        f"the artifact was compiled for {target.name!r} ({target.mcpu}) and uses AMX, which the system refuses this "
        f"process ({os.strerror(ctypes.get_errno())}): run it on Linux 5.16 or later, outside a sandbox that forbids "
        'arch_prctl, or compile the model again with precision="fp32" or target="cpu:cooperlake"'
    )


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TargetError(
            f"cannot find out which features this CPU has: {CPUINFO} cannot be read ({error.strerror}). "
            "Compiled code runs on Linux only, with /proc mounted"
        ) from error


def _flags(cpuinfo: str, key: str) -> frozenset[str]:
    """Return the flags that every processor in the text has."""
    rows = (line.partition(":") for line in cpuinfo.splitlines())
    per_core = [frozenset(flags.split()) for name, _, flags in rows if name.strip() == key]
    if not per_core:
        raise TargetError(f"cannot find out which features this CPU has: {CPUINFO} has no {key!r} line")
    return frozenset.intersection(*per_core)


def cpu_name() -> str:
    """Return the CPU's model as the system names it: its name and family, or the numbers that identify an Arm core."""
    try:
        rows = [line.partition(":") for line in CPUINFO.read_text(errors="replace").splitlines()]
    except OSError:
        rows = []
    values = {name.strip(): value.strip() for name, _, value in reversed(rows)}
    return ", ".join(values[name] for name in _NAMED_BY if name in values) or "unknown CPU"


def machine_name(threads: int) -> str:
    """Return the name that measured costs are kept under: the CPU, and how many threads a model has."""
    return f"{cpu_name()}; {threads} thread{'s' if threads != 1 else ''}"
