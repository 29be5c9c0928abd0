"""Lowering: from a module that calls our operators to an executable and prepared weights.

A CPU's kernels are compiled each by itself, and kept in a cache (`kernel_objects`); TVM compiles what is left of the
module and links both. A GPU's kernels stay in the module, which TVM compiles whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tvm
from tvm import ir, relax

from turbo_tvm import config
from turbo_tvm.compiler import pipeline, targets
from turbo_tvm.compiler.cuda import lowering as cuda_lowering
from turbo_tvm.compiler.cuda.block_counts import BlockCounts
from turbo_tvm.compiler.kernel_cache import open_cache
from turbo_tvm.compiler.kernel_objects import Kernel, KernelObjects
from turbo_tvm.compiler.kernels import Kernels, Tuned
from turbo_tvm.compiler.observation import observed
from turbo_tvm.compiler.pipeline import Optimized
from turbo_tvm.errors import CompileError, summary
from turbo_tvm.ops.entry import ENCODE, TRANSFORM_WEIGHTS
from turbo_tvm.ops.inputs import weight_params
from turbo_tvm.passes.call_kernels import call_kernels
from turbo_tvm.passes.lower_kernels import lower_kernels
from turbo_tvm.passes.module_pass import Reporting
from turbo_tvm.passes.plan_memory import MemoryPlan, plan_batch_memory
from turbo_tvm.schedules.cuda.tiles import CudaTiles
from turbo_tvm.tvm_compat import LINKED_LIBRARIES


@dataclass(frozen=True)
class Built:
    """Code and weights."""

    executable: relax.VMExecutable
    memory: MemoryPlan  # what the executor supplies
    outputs: tuple[relax.TensorType, ...]
    parameters: dict[str, np.ndarray] = field(default_factory=dict)  # prepared weights by name, in call order
    device_source: str = ""  # the CUDA C of the kernels; none for a CPU
    device_counts: dict[str, BlockCounts] = field(default_factory=dict)  # what is counted of each of these
    compiled_kernels: int = 0  # how many kernels were compiled by themselves
    cached_kernels: int = 0  # how many more came from the cache


def build(
    optimized: Optimized,
    weights: list[tvm.runtime.Tensor],
    target: tvm.target.Target,
    planned: bool = True,
    tuned: Tuned | None = None,
) -> Built:
    """Turn a module that calls our operators into machine code, and prepare its weights.

    weights: the model's weights in the order of the imported module's parameters; this machine prepares them, which may
    be another than the target. planned: False leaves intermediates to TVM's own allocator. tuned: the variants of
    kernels, by name.
    """
    tiles, host = optimized.tiles, targets.resolve("cpu")
    kernels, objects = Kernels(tiles, tuned), KernelObjects(open_cache())
    row_tile = tiles.row_tile if planned else None
    encode, transform = (_with_only(optimized.mod, name) for name in (ENCODE, TRANSFORM_WEIGHTS))
    names = [p.name for p in weight_params(encode[ENCODE])]
    prepared = _prepare_weights(_linked(transform, kernels, objects, host)[0], weights, host)
    if isinstance(tiles, CudaTiles):
        built = _compile_cuda(lower_kernels(encode, kernels), target, row_tile)
    else:
        built = _compile_cpu(*_linked(encode, kernels, objects, target), target, row_tile)
    return replace(
        built,
        parameters=dict(zip(names, prepared, strict=True)),
        compiled_kernels=objects.compiled,
        cached_kernels=objects.cached,
    )


def _compile_cpu(
    mod: ir.IRModule, called: Mapping[str, Kernel], target: tvm.target.Target, row_tile: int | None
) -> Built:
    """Return the code of a module that is linked with its kernels. called: these, by the names it calls them by."""
    overwrites = {symbol: kernel.overwrites for symbol, kernel in called.items()}
    memory = Reporting(plan_batch_memory, ENCODE, row_tile, overwrites)
    with observed("lowering"):
        executable = tvm.compile(mod, target=target, relax_pipeline=pipeline.lowering(ENCODE, memory.step))
    return Built(executable, memory.report, _output_types(mod[ENCODE]))


def _compile_cuda(mod: ir.IRModule, target: tvm.target.Target, row_tile: int | None) -> Built:
    """Return the code of a module with a GPU's kernels in it: the host's, and CUDA C."""
    memory = Reporting(plan_batch_memory, ENCODE, row_tile)
    counts: dict[str, BlockCounts] = {}
    steps = pipeline.lowering(ENCODE, memory.step, cuda=True, captured=row_tile is not None)
    with config.tvm_keeps_cuda_source(), observed("lowering"):
        executable = tvm.compile(mod, target=target, relax_pipeline=steps, tir_pipeline=cuda_lowering.register(counts))
    source = cuda_lowering.source_of(executable.mod)
    return Built(executable, memory.report, _output_types(mod[ENCODE]), device_source=source, device_counts=counts)


def _with_only(mod: ir.IRModule, name: str) -> ir.IRModule:
    """Return the module with one of its two functions, and what that needs."""
    other = ENCODE if name == TRANSFORM_WEIGHTS else TRANSFORM_WEIGHTS
    part = ir.IRModule({var: f for var, f in mod.functions_items() if var.name_hint != other}, attrs=mod.attrs)
    return relax.transform.DeadCodeElimination([name])(part)


def _linked(
    mod: ir.IRModule, kernels: Kernels, objects: KernelObjects, target: tvm.target.Target
) -> tuple[ir.IRModule, dict[str, Kernel]]:
    """Return the module linked with its kernels' code, and the kernels by the names that it calls them by."""
    mod, called = call_kernels(mod, kernels.kernel)
    return mod.with_attr(LINKED_LIBRARIES, objects.libraries(called, target)), called


def _prepare_weights(mod: ir.IRModule, weights: list[tvm.runtime.Tensor], host: tvm.target.Target) -> list[np.ndarray]:
    """Run `transform_weights` once, on this machine."""
    executable = tvm.compile(mod, target=host)
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:
        path = Path(directory) / "weights.so"
        write_library(executable.mod, path)
        machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    return [np.from_dlpack(result) for result in machine[TRANSFORM_WEIGHTS](*weights)]


def write_library(code: relax.VMExecutable | tvm.runtime.Module, path: Path) -> None:
    """Link compiled code and all that belongs to it to a shared library. Raises CompileError if that fails."""
    try:
        code.export_library(str(path))
    except (OSError, RuntimeError) as error:
        raise CompileError(f"linking the code failed: {summary(error)}") from error


def _output_types(func: relax.Function) -> tuple[relax.TensorType, ...]:
    ty = func.ret_ty
    return tuple(ty.fields) if isinstance(ty, relax.TupleType) else (ty,)
