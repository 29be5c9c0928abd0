"""Which kernel implements an operator: one table, by operator and device, the first that fits first.

A kernel family is a schedule with its knobs. A new kernel is a file beside the others and a line here; what its
operands are for is said by the operator's record (`ops/operand.py`, `Role`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tvm import tirx

from turbo_tvm.ops import (
    Attention,
    CastRows,
    CastWeight,
    Embedding,
    Gate,
    L2Normalize,
    Linear,
    Norm,
    Operator,
    PackBias,
    PackDistances,
    PackWeight,
    Pool,
    Rotary,
    Softmax,
    TileRows,
    UntileRows,
)
from turbo_tvm.schedules import cpu, cuda
from turbo_tvm.schedules.common import weights
from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cuda.tiles import CudaTiles

Tiles = CpuTiles | CudaTiles
Schedule = Callable[[Any, Any, Sequence[Variant]], tirx.PrimFunc]  # (operator, tiles, variants) -> kernel


def _nothing(_operator: Operator, _tiles: Tiles) -> str:
    return ""


@dataclass(frozen=True)
class KernelFamily:
    """A schedule, and what else there is to know of it."""

    name: str  # "cpu.linear.linear": manifests and tuning logs know it by this
    device: str  # what runs it: "cpu" or "cuda"
    operator: type[Operator]
    build: Schedule
    version: int = 0  # of its code: measurements of another one say nothing about it; 0: it has nothing to tune
    space: Callable[[Any, Any], Space] | None = None
    refuses: Callable[[Any, Any], str] = _nothing  # why it cannot do an operator, "" if it can
    suffix: str = ""  # what the names of its kernels end with, to tell them from those of another family

    def space_of(self, operator: Operator, tiles: Tiles) -> Space:
        """Return what can be tuned."""
        return Space() if self.space is None else self.space(operator, tiles)


def _family(device: str, module: ModuleType, schedule: str, operator: type[Operator], **more: Any) -> KernelFamily:
    """Return a family of a module, with the version, the knobs and the limits that the module declares."""
    name = f"{device}.{module.__name__.rpartition('.')[2]}.{schedule}"
    declared = {"version": getattr(module, "VERSION", 0), "space": getattr(module, "space", None)}
    declared["refuses"] = getattr(module, "refuses", _nothing)
    runs_on = "cuda" if device == "cuda" else "cpu"
    return KernelFamily(name, runs_on, operator, getattr(module, schedule), **{**declared, **more})


_CPU = (
    _family("cpu", cpu.embedding, "embedding", Embedding),
    _family("cpu", cpu.linear_amx, "linear", Linear, suffix="amx"),
    _family("cpu", cpu.linear, "linear", Linear),
    _family("cpu", cpu.gate, "gate", Gate),
    _family("cpu", cpu.rotary, "rotary", Rotary),
    _family("cpu", cpu.attention_amx, "attention", Attention, suffix="amx"),
    _family("cpu", cpu.attention, "attention", Attention),
    _family("cpu", cpu.normalization, "norm", Norm),
    _family("cpu", cpu.normalization, "l2_normalize", L2Normalize),
    _family("cpu", cpu.pooling, "pool", Pool),
    _family("cpu", cpu.rows, "cast_rows", CastRows),
    _family("cpu", cpu.rows, "tile_rows", TileRows),
    _family("cpu", cpu.rows, "untile_rows", UntileRows),
)
_CUDA = (
    _family("cuda", cuda.embedding, "embedding", Embedding),
    _family("cuda", cuda.linear, "linear", Linear),
    _family("cuda", cuda.gate, "gate", Gate),
    _family("cuda", cuda.rotary, "rotary", Rotary),
    _family("cuda", cuda.attention, "attention", Attention),
    _family("cuda", cuda.normalization, "norm", Norm),
    _family("cuda", cuda.normalization, "l2_normalize", L2Normalize),
    _family("cuda", cuda.softmax, "softmax", Softmax),
    _family("cuda", cuda.pooling, "pool", Pool),
    _family("cuda", cuda.rows, "cast_rows", CastRows),
)
_HOST = (  # weights are prepared on the CPU that compiles, whatever the target
    _family("common", weights, "pack_weight", PackWeight),
    _family("common", weights, "pack_bias", PackBias),
    _family("common", weights, "cast_weight", CastWeight),
    _family("cpu", cpu.distances, "pack_distances", PackDistances),
)
FAMILIES: tuple[KernelFamily, ...] = (*_CPU, *_CUDA, *_HOST)


def candidates(operator: type[Operator], tiles: Tiles) -> list[KernelFamily]:
    """Return the families that implement a kind of operator on the device of these tiles."""
    of_device = _CUDA if isinstance(tiles, CudaTiles) else _CPU
    return [family for family in (*of_device, *_HOST) if family.operator is operator]


def family_of(operator: Operator, tiles: Tiles) -> KernelFamily:
    """Return the family that implements an operator. Raises LookupError if none does."""
    for family in candidates(type(operator), tiles):
        if not family.refuses(operator, tiles):
            return family
    raise LookupError(f"no kernel for {operator.NAME}: {refusal(operator, tiles)}")


def refusal(operator: Operator, tiles: Tiles) -> str:
    """Return why no family implements an operator, "" if one does."""
    reasons = [family.refuses(operator, tiles) for family in candidates(type(operator), tiles)]
    if not reasons:
        return f"{operator.NAME}, which the target has no kernel for"
    return "" if "" in reasons else reasons[-1]


def named(name: str) -> KernelFamily:
    """Return the family of that name. Raises LookupError for any other."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise LookupError(f"there is no kernel family {name!r}")
