"""From CUDA schedules to CUDA C: TVM's lowering, in which hand-written kernels keep the barriers that they have.

TVM inserts a `__syncthreads` wherever two accesses to shared memory might meet, and cannot see that a warp works on a
part of its own, or that two stages lie apart. It lets shared buffers take each other's place, cuts the padding off
their rows, takes loads of tensor cores for statements without effect, and spells bf16 out in integers. The kernels of
`schedules/cuda` say where barriers are needed, and are marked; everything else, such as what TVM's own rules schedule,
gets all of TVM's passes.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight
from tvm.tirx import compilation_pipeline

from turbo_tvm.compiler.cuda import block_counts
from turbo_tvm.compiler.cuda.block_counts import BlockCounts
from turbo_tvm.errors import CompileError
from turbo_tvm.schedules.cuda.script import SYNCHRONIZED

NAME = "turbo_tvm_cuda"


def source_of(module: tvm.runtime.Module) -> str:
    """Return the CUDA C in a module or in what it imports. Raises CompileError if there is none."""
    pending = [module]
    while pending:
        part = pending.pop()
        if part.kind == "cuda":
            return part.inspect_source("cuda")
        pending.extend(part.imports)
    raise CompileError("TVM made no CUDA code for this model")


def register(counts: dict[str, BlockCounts] | None = None) -> str:
    """Make the pipeline known to TVM, and return the name to pass as `tir_pipeline`.

    counts: gets what is counted of each kernel that it lowers.
    """
    pipeline = _pipeline({} if counts is None else counts)
    finish = s_tir.pipeline.finalize_host_passes, s_tir.pipeline.finalize_device_passes
    compilation_pipeline.register_tir_pipeline(NAME, lambda: (pipeline, *finish))
    return NAME


@tvm.transform.module_pass(opt_level=0, name="turbo_tvm.schedule_others")
def schedule_others(mod: ir.IRModule, _ctx: tvm.transform.PassContext) -> ir.IRModule:
    """Give every kernel that has no schedule one of TVM's, for operators that no operator of ours claimed."""
    rules = dlight.gpu
    return dlight.ApplyDefaultSchedule(
        rules.Matmul(), rules.GEMV(), rules.Reduction(), rules.GeneralReduction(), rules.Fallback()
    )(mod)


def _pipeline(counts: dict[str, BlockCounts]) -> tvm.transform.Pass:
    """Return TVM's passes from schedules to host and device code, in its order, and one that counts."""
    s, t = s_tir.transform, tirx.transform

    @tvm.transform.module_pass(opt_level=0, name="turbo_tvm.count")
    def count(mod: ir.IRModule, _ctx: tvm.transform.PassContext) -> ir.IRModule:
        counts.update({var.name_hint: block_counts.count(func) for var, func in mod.functions_items()})
        return mod

    return tvm.transform.Sequential(
        [
            s.CanonicalizeLoop(),
            s.LowerCrossThreadReduction(),
            s.LowerInitBlock(),
            _others(s.PlanAndUpdateBufferAllocationLocation()),
            s.ConvertBlocksToOpaque(),
            s.LiftThreadBinding(),
            s.ManifestSharedMemoryLocalStage(),
            _others(s.CompactBufferAllocation()),
            s.LowerAutoCopy(),
            s.UnifyThreadBinding(),
            s.LowerMatchBuffer(),
            s.StmtSimplify(),
            s.InjectPermutedLayout(),
            s.AnnotateIrregularLoop(),
            s.InjectSoftwarePipeline(),
            s.TransformMmaBufferLayout(),
            s.LowerOpaqueBlock(),
            t.FlattenBuffer(),
            _others(t.BF16ComputeLegalize()),
            t.NarrowDataType(32),
            s.LoopPartition(),
            t.VectorizeLoop(True),
            s.InjectVirtualThread(),
            s.InjectDoubleBuffer(),
            _others(t.StorageRewrite()),
            _others(s.HoistIfThenElse()),
            t.UnrollLoop(),
            s.RenormalizeSplitPattern(),
            t.StmtSimplify(),
            _others(t.RemoveNoOp()),
            s.RewriteUnsafeSelect(),
            t.CommonSubexprElim(),
            t.VerifyMemory(),
            t.AnnotateEntryFunc(),
            _others(s.ThreadSync("shared")),
            _others(s.ThreadSync("shared.dyn")),
            s.ThreadSync("warp"),
            s.InferFragment(),
            s.LowerThreadAllreduce(),
            s.MergeSharedMemoryAllocations(),
            count,
            t.SplitHostDevice(),
            t.MakePackedAPI(),
            _others(t.BF16StorageLegalize()),
        ]
    )


def _others(step: tvm.transform.Pass) -> tvm.transform.Pass:
    """Return the pass on the functions that do not synchronise themselves."""

    @tvm.transform.module_pass(opt_level=0, name=f"turbo_tvm.{step.info.name}")
    def on_others(mod: ir.IRModule, _ctx: tvm.transform.PassContext) -> ir.IRModule:
        ours, others = _split(mod, lambda func: SYNCHRONIZED in dict(func.attrs or {}))
        others = step(others)
        others.update(ours)
        return others

    return on_others


def _split(mod: ir.IRModule, first: Callable[[ir.BaseFunc], bool]) -> tuple[ir.IRModule, ir.IRModule]:
    """Return the functions of which `first` holds, and the others."""
    parts: tuple[dict[ir.GlobalVar, ir.BaseFunc], dict[ir.GlobalVar, ir.BaseFunc]] = ({}, {})
    for var, func in mod.functions_items():
        parts[0 if first(func) else 1][var] = func
    return ir.IRModule(parts[0]), ir.IRModule(parts[1], attrs=mod.attrs)
