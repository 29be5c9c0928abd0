"""Occupancy: how many blocks of a kernel one multiprocessor of a GPU holds at a time, by NVIDIA's rules.

The figures are from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turbo_tvm.artifact.manifest import DeviceKernelSpec

WARP = 32
_REGISTERS = 65536  # of a multiprocessor, since sm_50
_REGISTER_UNIT = 256  # a warp gets registers in multiples of this


@dataclass(frozen=True)
class Multiprocessor:
    """The resources of a multiprocessor."""

    warps: int  # at a time
    blocks: int  # at a time
    shared: int  # bytes of shared memory
    unit: int = 128  # bytes; a block gets shared memory in multiples of this
    reserved: int = 1024  # bytes of shared memory that each block costs beyond its own


_KIB = 1024
_MULTIPROCESSORS = {
    "sm_70": Multiprocessor(64, 32, 96 * _KIB, unit=256, reserved=0),
    "sm_75": Multiprocessor(32, 16, 64 * _KIB, unit=256, reserved=0),
    "sm_80": Multiprocessor(64, 32, 164 * _KIB),
    "sm_86": Multiprocessor(48, 16, 100 * _KIB),
    "sm_87": Multiprocessor(48, 16, 164 * _KIB),
    "sm_89": Multiprocessor(48, 24, 100 * _KIB),
    "sm_90": Multiprocessor(64, 32, 228 * _KIB),
    "sm_100": Multiprocessor(64, 32, 228 * _KIB),
    "sm_103": Multiprocessor(64, 32, 228 * _KIB),
    "sm_120": Multiprocessor(48, 24, 100 * _KIB),
    "sm_121": Multiprocessor(48, 24, 100 * _KIB),
}


@dataclass(frozen=True)
class Occupancy:
    """How well a kernel fills a multiprocessor."""

    blocks: int  # that fit it at a time
    share: float  # of its warps that they fill
    limit: str  # the resource that forbids more blocks


def occupancy(kernel: DeviceKernelSpec) -> Occupancy | None:
    """Return a kernel's occupancy; None for an architecture whose figures are not known here."""
    has = _MULTIPROCESSORS.get(kernel.architecture)
    if has is None:
        return None
    warps = -(-kernel.threads // WARP)
    registers = _round_up(kernel.registers * WARP, _REGISTER_UNIT)
    # Registers are handed out by each of the four schedulers, to warps.
    by_registers = _REGISTERS // 4 // registers * 4 // warps if registers else has.blocks
    asked = kernel.static_shared_bytes + kernel.dynamic_shared_bytes
    shared = _round_up(asked + has.reserved, has.unit)
    by_shared = has.shared // shared if shared else has.blocks
    limits = {"blocks": has.blocks, "warps": has.warps // warps, "registers": by_registers, "shared memory": by_shared}
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / has.warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
