"""The variants that tuning logs hold for the kernels of a model: what the compiler builds in place of the defaults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import tvm

from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler import targets
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.compiler.tuning_log import KernelLog, TaskRecord, TuningLog
from turbo_tvm.errors import CompileError, TuningLogError
from turbo_tvm.schedules.common.space import Variant, checked

SHIPPED = Path(__file__).resolve().parents[1] / "tuning_logs"


@dataclass(frozen=True)
class Applied:
    """variants: by kernel, where a log has better ones than the default; the default was best for `as_default`.

    refused: why a kernel's log does not hold here, by kernel; such a kernel is built as it is by itself.
    """

    variants: dict[str, tuple[Variant, ...]] = field(default_factory=dict)
    as_default: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


def chosen(kernels: Iterable[KernelSpec], target: str, logs: str | PathLike[str] | bool) -> Applied:
    """Return what logs say of these kernels.

    logs: their directory; True for those that come with turbo_tvm, False for none. Raises CompileError for a directory
    that does not exist, TuningLogError for a damaged log.
    """
    if logs is False:
        return Applied()
    path = SHIPPED if logs is True else Path(logs)
    if logs is not True and not path.is_dir():
        raise CompileError(f"there is no directory of tuning logs at {path}")
    return applied(kernels, target, path)


def applied(kernels: Iterable[KernelSpec], target: str, logs: Path) -> Applied:
    """What the logs below `logs` say of these kernels on that target. TuningLogError for a damaged one."""
    log = TuningLog(logs, targets.log_name(target))
    found = Applied()
    as_default = []
    for spec in kernels:
        if not spec.recipe or not log.path(spec.name).exists():
            continue
        recipe = KernelRecipe.from_json(spec.recipe)
        task = TaskRecord(spec.name, spec.recipe, recipe.version, log.target, tvm.__version__)
        known = log.read(task)
        if known.result is None:
            reason = _refusal(task, known)
            if reason:
                found.refused[spec.name] = f"{log.path(spec.name)}: {reason}"
            continue
        variants = known.result.as_variants()
        if variants:
            found.variants[spec.name] = _fitting(log, spec.name, recipe, variants)
        else:
            as_default.append(spec.name)
    return Applied(found.variants, tuple(as_default), found.refused)


def _refusal(task: TaskRecord, known: KernelLog) -> str:
    """Why a log without a result for this task is of no use; "" if it is merely unfinished."""
    if known.task is not None or not known.others:
        return ""
    return "measured with " + "; ".join(task.differences(known.others[-1]))


def _fitting(log: TuningLog, name: str, recipe: KernelRecipe, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """The variants; TuningLogError unless the kernel can be built with them."""
    try:
        checked(variants, recipe.space)
    except ValueError as error:
        raise TuningLogError(
            f"the tuning log {log.path(name)} names a setting that this kernel does not have: {error}"
        ) from None
    return variants
