"""The pipeline: from an imported graph to code, one page, top to bottom. What runs, in the order in which it runs:

    import     `frontends/import_passes.py`: an importer runs these, what they find says how to feed the model
    packed     one row per token; a model that any of its passes declines is compiled by `padded` instead:
    padded     right for every graph that TVM can compile, without the project's speed
    kernels    `lower_kernels` (GPUs), `call_kernels` (CPUs): operators become calls of kernels, see `lowering.py`
    lowering   TVM's way to its virtual machine, with our memory plan in it

Set `TURBO_TVM_DUMP_IR=directory` to get the module after every pass as text, in a folder per phase, and
`TURBO_TVM_TIME_PASSES=1` to see how long each takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import ir, relax

from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler.cuda import lowering as cuda_lowering
from turbo_tvm.compiler.kernels import Kernels, Tuned, inventory
from turbo_tvm.compiler.observation import observed
from turbo_tvm.ops import Attention, Pool, formats
from turbo_tvm.ops.call import operators
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.passes.canonicalize import canonicalize
from turbo_tvm.passes.capture_graphs import capture_graphs
from turbo_tvm.passes.compose_operators import compose_operators
from turbo_tvm.passes.drop_mask import drop_mask
from turbo_tvm.passes.fuse_attention import fuse_attention
from turbo_tvm.passes.fuse_embedding import fuse_embedding
from turbo_tvm.passes.fuse_gate import fuse_gate
from turbo_tvm.passes.fuse_linear import fuse_linear
from turbo_tvm.passes.fuse_norm import fuse_norm
from turbo_tvm.passes.fuse_pooling import fuse_pooling
from turbo_tvm.passes.lift_transform_params import lift_transform_params
from turbo_tvm.passes.lower_precision import lower_precision
from turbo_tvm.passes.mark_no_alias import mark_no_alias
from turbo_tvm.passes.merge_qkv import merge_qkv
from turbo_tvm.passes.module_pass import Pass, step
from turbo_tvm.passes.pack_weights import pack_weights
from turbo_tvm.passes.remove_padding import Declined, remove_padding
from turbo_tvm.passes.tile_rows import tile_rows
from turbo_tvm.passes.widen_rows import widen_rows
from turbo_tvm.schedules import registry
from turbo_tvm.schedules.cpu.tiles import BASELINE, CpuTiles
from turbo_tvm.schedules.cuda.tiles import CudaTiles
from turbo_tvm.schedules.registry import Tiles


def packed(function: str, tiles: Tiles, max_length: int, stored: formats.Format) -> Pass:
    """Return the passes for a model whose padding can be removed.

    function: the name of the model's function; tiles: of the target; max_length: tokens of the longest sequence;
    stored: the format of weights and of the rows between operators.
    """
    cpu = isinstance(tiles, CpuTiles)
    return tvm.transform.Sequential(
        [
            # Recognise: what mixes tokens, while the mask is still there to say how.
            step(canonicalize, function),
            step(compose_operators, function),
            step(fuse_attention, function, max_length),
            step(fuse_pooling, function),
            step(drop_mask, function),
            # Pack: one matrix row per token; raises Declined if anything else mixes tokens.
            step(remove_padding, function, tiles.row_tile),
            # Fuse what is left, row by row.
            step(fuse_linear, function),
            step(fuse_gate, function),
            step(merge_qkv, function),
            step(fuse_norm, function, in_products=cpu),
            step(fuse_embedding, function),
            # Store: in which format, and how far apart (a CPU's caches want that).
            *_stored_as(function, stored, tiles),
            *([step(widen_rows, function, amx=tiles.amx)] if isinstance(tiles, CpuTiles) else []),
            # Weights: into the kernels' layout, and out of the model's function.
            step(pack_weights, function, tiles.col_tile, pairs=tiles.in_pairs),
            step(lift_transform_params, function),
            step(check_kernels, function, tiles),
        ],
        name="packed",
    )


def padded(function: str, tiles: Tiles, stored: formats.Format) -> Pass:
    """Return the passes for any other model: products are fused, everything else is TVM's."""
    cpu = isinstance(tiles, CpuTiles)
    return tvm.transform.Sequential(
        [
            step(canonicalize, function),
            step(compose_operators, function),
            step(fuse_linear, function),
            step(fuse_norm, function, in_products=cpu),
            step(tile_rows, function, tiles.row_tile),
            *_stored_as(function, stored, tiles),
            step(pack_weights, function, tiles.col_tile, pairs=tiles.in_pairs),
            step(lift_transform_params, function),
        ],
        name="padded",
    )


def _stored_as(function: str, stored: formats.Format, tiles: Tiles) -> list[Pass]:
    if stored == formats.FP32:
        return []
    return [step(lower_precision, function, stored, pairs=tiles.in_pairs, vectors=isinstance(tiles, CudaTiles))]


def check_kernels(mod: ir.IRModule, function: str, tiles: Tiles) -> ir.IRModule:
    """Return the module. Raises Declined if an operator is more than the target's kernels can do."""
    for operator in operators(mod[function]):
        reason = registry.refusal(operator.without_graph(), tiles)
        if reason:
            raise Declined(reason)
    return mod


def lowering(function: str, plan_memory: Pass, *, cuda: bool = False, captured: bool = False) -> Pass:
    """Return TVM's own way from a graph to its virtual machine, with our memory plan in it.

    plan_memory: makes buffers parameters of the function. cuda: what TVM legalised gets a schedule by TVM's rules; a
    CPU runs it as it is. captured: a twin of the function replays it as a CUDA graph.
    """
    t = relax.transform
    return tvm.transform.Sequential(
        [
            # Operators of TVM to loops. As TVM's own CPU pipeline: sorts and scans (cumsum, topk) are not legalised.
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            t.LegalizeOps(),
            t.AnnotateTIROpPattern(),
            t.FoldConstant(),
            t.FuseOps(),
            t.FuseTIR(),
            *([cuda_lowering.schedule_others] if cuda else []),
            # Values to memory: ours is planned by the runtime, TVM's what is left.
            t.RewriteDataflowReshape(),
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
            plan_memory,
            t.StaticPlanBlockMemory(),
            *([step(capture_graphs, function)] if captured else []),
            # Calls to the virtual machine's.
            t.LowerAllocTensor(),
            t.KillAfterLastUse(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            step(mark_no_alias),
            t.AttachGlobalSymbol(),
        ],
        name="lowering",
    )


@dataclass(frozen=True)
class Optimized:
    """A module whose function calls our operators, ready to lower."""

    mod: ir.IRModule
    layout: str  # "packed" or "padded"
    declined: tuple[str, ...] = ()  # why, if it is not packed
    tiles: Tiles = BASELINE  # of the target

    @property
    def function(self) -> relax.Function:
        """The model's function."""
        return self.mod[ENCODE]

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """What the function calls and what it costs."""
        return self.kernels_in({})

    def kernels_in(self, tuned: Tuned) -> tuple[KernelSpec, ...]:
        """Return the same, with the variants that these kernels are built in."""
        return inventory(self.function, Kernels(self.tiles, tuned))

    @property
    def relative_positions(self) -> bool:
        """Whether attention looks at the distance between tokens."""
        return any(isinstance(found, Attention) and found.is_relative for found in operators(self.function))

    @property
    def pooled_token(self) -> int | None:
        """The id of the token that is pooled, if any, `ops.pool.LARGEST` for the largest one."""
        pools = [found for found in operators(self.function) if isinstance(found, Pool)]
        return next((pool.token for pool in pools if pool.token is not None), None)

    @property
    def pools_first(self) -> bool:
        """Whether an output is made from a sequence's first token."""
        return any(isinstance(found, Pool) and found.mode == "first" for found in operators(self.function))


def optimize(mod: ir.IRModule, tiles: Tiles, max_length: int, precision: str = "fp32") -> Optimized:
    """Turn a graph into operators: packed if every part allows it, else padded with the reason kept."""
    stored = formats.by_name(precision)
    try:
        with observed("packed"):
            return Optimized(packed(ENCODE, tiles, max_length, stored)(mod), "packed", tiles=tiles)
    except Declined as why:
        with observed("padded"):
            done = padded(ENCODE, tiles, stored)(mod)
        return Optimized(done, "padded", (f"padding was not removed: {why}",), tiles)
