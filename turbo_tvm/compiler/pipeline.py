"""The pipeline: from an imported model to an executable, one page, top to bottom.

`packed` and `padded` list the passes in the order in which they run. A model that any pass of `packed` declines is
compiled by `padded`: right for every graph that TVM can compile, without the project's speed. Set
`TURBO_TVM_DUMP_IR=directory` to get the module after every pass as text, in a folder per layout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tvm
from tvm import ir, relax, tirx

from turbo_tvm import config
from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler.cuda import lowering
from turbo_tvm.compiler.cuda.block_counts import BlockCounts
from turbo_tvm.compiler.cuda.kernels import CudaKernels
from turbo_tvm.compiler.kernel_names import has_distances, has_position_bias
from turbo_tvm.compiler.kernels import CpuKernels, Tuned, composites, inventory
from turbo_tvm.passes.capture_graphs import capture_graphs
from turbo_tvm.passes.compose_operators import compose_operators
from turbo_tvm.passes.drop_mask import drop_mask
from turbo_tvm.passes.fuse_attention import fuse_attention
from turbo_tvm.passes.fuse_embedding import fuse_embedding
from turbo_tvm.passes.fuse_gate import fuse_gate
from turbo_tvm.passes.fuse_linear import fuse_linear
from turbo_tvm.passes.fuse_norm import fuse_norm
from turbo_tvm.passes.fuse_pooling import fuse_pooling
from turbo_tvm.passes.hoist_weights import TRANSFORM, hoist_weights
from turbo_tvm.passes.lower_kernels import lower_kernels
from turbo_tvm.passes.lower_precision import lower_precision
from turbo_tvm.passes.merge_qkv import merge_qkv
from turbo_tvm.passes.normalize import normalize
from turbo_tvm.passes.pack_weights import pack_weights
from turbo_tvm.passes.plan_memory import MemoryPlan, plan_memory
from turbo_tvm.passes.remove_padding import Declined, remove_padding, sequence_tiles
from turbo_tvm.passes.rewriter import dims_of
from turbo_tvm.passes.tile_rows import tile_rows
from turbo_tvm.passes.widen_rows import widen_rows
from turbo_tvm.schedules.cpu.tiles import BASELINE, CpuTiles
from turbo_tvm.schedules.cuda.attention import MAX_HEAD_DIM
from turbo_tvm.schedules.cuda.tiles import CudaTiles

Pass = Callable[[ir.IRModule], ir.IRModule]
Tiles = CpuTiles | CudaTiles

STORAGE = {"bf16": "uint16", "fp16": "float16"}  # the dtype of rows by precision, if it is not fp32


@dataclass(frozen=True)
class Optimized:
    """A module in composites, ready to lower.

    layout: "packed" or "padded"; declined: why, if not packed; tiles: of the target.
    """

    mod: ir.IRModule
    layout: str
    declined: tuple[str, ...] = ()
    tiles: Tiles = BASELINE

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """What `main` calls and what it costs."""
        return self.kernels_in({})

    def kernels_in(self, tuned: Tuned) -> tuple[KernelSpec, ...]:
        """The same, with the variants that these kernels are built in."""
        return inventory(self.mod, _kernels(self.tiles, tuned))

    @property
    def relative_positions(self) -> bool:
        """Whether attention looks at the distance between tokens."""
        return any(
            has_position_bias(fused) or has_distances(fused) or "window" in fused.attrs
            for fused, _ in composites(self.mod["main"])
        )

    @property
    def pooled_token(self) -> int | None:
        """The id of the token that is pooled, if any, `fuse_pooling.LARGEST` for the largest one."""
        pools = [fused for fused, _ in composites(self.mod["main"]) if fused.name == "pool"]
        return next((fused.attrs["token"] for fused in pools if "token" in fused.attrs), None)

    @property
    def pools_first(self) -> bool:
        """Whether an output is made from a sequence's first token."""
        return any(fused.attrs.get("mode") == "first" for fused, _ in composites(self.mod["main"]))


@dataclass(frozen=True)
class Built:
    """Code and weights. parameters: prepared weights by name, in call order; memory: what the executor supplies.

    device_source: the CUDA C of the kernels; none for a CPU. device_counts: what is counted of each.
    """

    executable: relax.VMExecutable
    parameters: dict[str, np.ndarray]
    memory: MemoryPlan
    outputs: tuple[relax.TensorType, ...]
    device_source: str = ""
    device_counts: dict[str, BlockCounts] = field(default_factory=dict)


def packed(tiles: Tiles, max_length: int, precision: str) -> list[Pass]:
    """Passes for a model whose padding can be removed."""
    cpu = isinstance(tiles, CpuTiles)
    amx = isinstance(tiles, CpuTiles) and tiles.amx
    return [
        # Recognise: what mixes tokens, while the mask is still there to say how.
        normalize,
        compose_operators,
        lambda mod: fuse_attention(mod, max_length),
        fuse_pooling,
        drop_mask,
        # Pack: one matrix row per token; raises Declined if anything else mixes tokens.
        lambda mod: remove_padding(mod, tiles.row_tile),
        # Fuse what is left, row by row.
        fuse_linear,
        fuse_gate,
        merge_qkv,
        lambda mod: fuse_norm(mod, in_products=cpu),
        fuse_embedding,
        # Store: in which format, and how far apart (a CPU's caches want that).
        *_lower_precision(cpu, precision),
        *([lambda mod: widen_rows(mod, amx)] if cpu else []),
        # Weights: into the kernels' layout, and out of the model's function.
        lambda mod: pack_weights(mod, tiles.col_tile, pairs=cpu),
        hoist_weights,
    ]


def padded(tiles: Tiles, precision: str) -> list[Pass]:
    """Passes for any other model: products are fused, everything else is TVM's."""
    cpu = isinstance(tiles, CpuTiles)
    return [
        normalize,
        compose_operators,
        fuse_linear,
        lambda mod: fuse_norm(mod, in_products=cpu),
        lambda mod: tile_rows(mod, tiles.row_tile),
        *_lower_precision(cpu, precision),
        lambda mod: pack_weights(mod, tiles.col_tile, pairs=cpu),
        hoist_weights,
    ]


def _lower_precision(cpu: bool, precision: str) -> list[Pass]:
    if precision == "fp32":
        return []
    return [lambda mod: lower_precision(mod, STORAGE[precision], pairs=cpu, vectors=not cpu)]


def optimize(mod: ir.IRModule, tiles: Tiles, max_length: int, precision: str = "fp32") -> Optimized:
    """Graph to composites: packed if every part allows it, else padded with the reason kept."""
    try:
        done = _run(mod, packed(tiles, max_length, precision), "packed")
        if isinstance(tiles, CudaTiles):
            _check_attention(done)
        return Optimized(done, "packed", tiles=tiles)
    except Declined as why:
        done = _run(mod, padded(tiles, precision), "padded")
        return Optimized(done, "padded", (f"padding was not removed: {why}",), tiles)


def _check_attention(mod: ir.IRModule) -> None:
    """Declined if a head does not fit the registers of a GPU, or attention looks at more than its kernel does."""
    for fused, _ in composites(mod["main"]):
        if fused.name == "attention" and fused.attrs["head_dim"] > MAX_HEAD_DIM:
            raise Declined(f"a head of {fused.attrs['head_dim']} columns; the GPU's kernel takes {MAX_HEAD_DIM}")
        if has_distances(fused):
            raise Declined("disentangled attention, which the GPU's kernel does not know")


def build(
    optimized: Optimized,
    weights: list[tvm.runtime.Tensor],
    target: tvm.target.Target,
    host: tvm.target.Target,
    tiles: Tiles,
    planned: bool = True,
    tuned: Tuned | None = None,
) -> Built:
    """Composites to machine code and prepared weights.

    weights: the model's weights in the order of the imported module's parameters. host: this machine, which prepares
    them; it may be another than the target. planned: False leaves intermediates to TVM's own allocator. tuned: the
    variants of kernels, by name.
    """
    cuda = isinstance(tiles, CudaTiles)
    mod = lower_kernels(optimized.mod, _kernels(tiles, tuned))
    names = [p.name for p in mod["main"].params[int(mod["main"].attrs["num_input"]) :]]
    parameters = _prepare_weights(mod, weights, names, host)
    main = ir.IRModule({var: f for var, f in mod.functions_items() if var.name_hint != TRANSFORM})
    main = relax.transform.DeadCodeElimination(["main"])(main)
    outputs = _output_types(main["main"])
    memory = [MemoryPlan()]
    relax_pipeline = _lowering(tiles.row_tile if planned else None, memory, cuda)
    counts: dict[str, BlockCounts] = {}
    tir_pipeline = lowering.register(counts) if cuda else "default"
    with config.tvm_keeps_cuda_source() if cuda else nullcontext():
        executable = tvm.compile(main, target=target, relax_pipeline=relax_pipeline, tir_pipeline=tir_pipeline)
    source = lowering.source_of(executable.mod) if cuda else ""
    return Built(executable, parameters, memory[0], outputs, source, counts)


def _kernels(tiles: Tiles, tuned: Tuned | None) -> CpuKernels | CudaKernels:
    return CudaKernels(tiles, tuned) if isinstance(tiles, CudaTiles) else CpuKernels(tiles, tuned)


def _prepare_weights(
    mod: ir.IRModule, weights: list[tvm.runtime.Tensor], names: list[str], host: tvm.target.Target
) -> dict[str, np.ndarray]:
    """Run `transform_weights` once, on this machine."""
    part = ir.IRModule({var: f for var, f in mod.functions_items() if var.name_hint != "main"})
    part = relax.transform.DeadCodeElimination([TRANSFORM])(part)
    machine = relax.VirtualMachine(tvm.compile(part, target=host), tvm.cpu())
    results = machine[TRANSFORM](*weights)
    return {name: np.from_dlpack(result) for name, result in zip(names, results, strict=True)}


def _lowering(row_tile: int | None, memory: list[MemoryPlan], cuda: bool) -> tvm.transform.Pass:
    """TVM's own lowering with our memory plan in its place, which goes to `memory`; without it if row_tile is None.

    cuda: what TVM legalised gets a schedule by TVM's rules; a CPU runs it as it is.
    """
    t = relax.transform

    @tvm.transform.module_pass(opt_level=0, name="turbo_tvm.plan_memory")
    def supplied_buffers(mod: ir.IRModule, _ctx) -> ir.IRModule:
        if row_tile is not None:
            mod, memory[0] = plan_memory(mod, _memory_symbols(mod["main"], row_tile))
        return mod

    return tvm.transform.Sequential(
        [
            # As TVM's own CPU pipeline: sorts and scans (cumsum, topk) are not legalised.
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            t.LegalizeOps(),
            t.AnnotateTIROpPattern(),
            t.FoldConstant(),
            t.FuseOps(),
            t.FuseTIR(),
            *([lowering.schedule_others] if cuda else []),
            t.RewriteDataflowReshape(),
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
            supplied_buffers,
            t.StaticPlanBlockMemory(),
            *([_capture_graphs] if cuda and row_tile is not None else []),
            t.LowerAllocTensor(),
            t.KillAfterLastUse(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            _no_alias,
            t.AttachGlobalSymbol(),
        ]
    )


@tvm.transform.module_pass(opt_level=0, name="turbo_tvm.capture_graphs")
def _capture_graphs(mod: ir.IRModule, _ctx) -> ir.IRModule:
    return capture_graphs(mod)


def _memory_symbols(main: relax.Function, row_tile: int) -> dict[str, ir.Expr]:
    """What sizes are made of, by `manifest.SYMBOLS`: the dimensions of the first input, and what follows from them."""
    first, second = dims_of(main.params[0].ty)[:2]
    packed = next((dims_of(p.ty) for p in main.params if p.name == "cu_seqlens"), None)
    if packed is not None:
        (boundaries,) = packed
        return {"token_tiles": first, "sequence_tiles": sequence_tiles(boundaries, row_tile)}
    return {"batch": first, "length": second, "row_tiles": (first * second + row_tile - 1) // row_tile}


@tvm.transform.module_pass(opt_level=0, name="turbo_tvm.no_alias")
def _no_alias(mod: ir.IRModule, _ctx) -> ir.IRModule:
    """Mark every PrimFunc as free of aliases.

    TVM 0.27 compiles a whole module by the mark of the function it declared last. Its own shape function has none, and
    attention then runs five times slower. It has a single buffer, and every other function is given distinct outputs,
    or one in the place of an input that the task that writes an element has read before (`plan_memory.OVERWRITES`).
    """
    functions = {
        var: func.with_attr("tirx.noalias", True) if isinstance(func, tirx.PrimFunc) else func
        for var, func in mod.functions_items()
    }
    return ir.IRModule(functions, attrs=mod.attrs)


def _output_types(func: relax.Function) -> tuple[relax.TensorType, ...]:
    ty = func.ret_ty
    return tuple(ty.fields) if isinstance(ty, relax.TupleType) else (ty,)


def _run(mod: ir.IRModule, passes: list[Pass], layout: str) -> ir.IRModule:
    directory = config.dump_ir_directory()
    for number, step in enumerate(passes):
        mod = step(mod)
        if directory is not None:
            _dump(mod, directory / layout, f"{number:02d}_{_pass_name(step)}")
    return mod


def _pass_name(step: Pass) -> str:
    names = getattr(step, "__code__", None)
    return step.__name__ if step.__name__ != "<lambda>" or names is None else names.co_names[0]


def _dump(mod: ir.IRModule, directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.py").write_text(mod.script(show_meta=False))
