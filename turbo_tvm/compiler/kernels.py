"""Where passes and schedules meet: which schedule implements a composite, and what it costs.

The passes know composites, the schedules know loops; the pipeline hands `CpuKernels`, or `CudaKernels` of
`cuda/kernels.py`, to `lower_kernels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import ir, relax, tirx

from turbo_tvm.artifact.manifest import KernelSpec, VariantSpec
from turbo_tvm.compiler.kernel_names import (
    fits_tiles,
    has_distances,
    has_position_bias,
    kernel_name,
    last_dim,
    reduced_columns,
    row_types,
    true_columns,
)
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.passes import composite
from turbo_tvm.passes.composite import Composite
from turbo_tvm.passes.rewriter import dims_of, shape_of
from turbo_tvm.schedules.common import weights
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import (
    attention,
    attention_amx,
    bf16,
    distances,
    embedding,
    gate,
    linear,
    linear_amx,
    normalization,
    pooling,
    rotary,
    rows,
)
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.tiles import CpuTiles
from turbo_tvm.schedules.cuda.tiles import CudaTiles

Recipe = tuple[Callable[..., tirx.PrimFunc], dict[str, Any]]  # a schedule and its parameters


Tuned = Mapping[str, Sequence[Variant]]  # variants by the kernel's name


class WeightKernels:
    """Builds the kernels that prepare weights, which run on the CPU that compiles, in the layout of `tiles`.

    tuned: the variants of those kernels that are not built as they are by themselves.
    """

    def __init__(self, tiles: CpuTiles | CudaTiles, tuned: Tuned | None = None):
        self.tiles = tiles
        self.tuned = tuned or {}

    def __call__(self, fused: Composite, out: relax.TensorType) -> tuple[str, tirx.PrimFunc]:
        """The kernel's name, unique for its parameters, and its PrimFunc."""
        recipe, name = self.recipe(fused, out), self.name(fused, out)
        return name, recipe.build(overwritable(fused, out), self.tuned.get(name, ()))

    def name(self, fused: Composite, out: relax.TensorType) -> str:
        """What the kernel is called."""
        return kernel_name(fused, out)

    def recipe(self, fused: Composite, out: relax.TensorType) -> KernelRecipe:
        """Which schedule implements a composite, with which parameters."""
        raise NotImplementedError

    def _pack_weight(self, fused: Composite, out: relax.TensorType) -> Recipe:
        dtype = {} if fused.attrs.get("pairs") else {"dtype": str(out.dtype)}
        return weights.pack_weight, fused.attrs | dtype

    def _pack_bias(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return weights.pack_bias, fused.attrs

    def _cast_weight(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return weights.cast_weight, {"shape": tuple(fused.attrs["shape"]), "dtype": str(out.dtype)}

    def _pack_distances(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return distances.pack_distances, fused.attrs


class CpuKernels(WeightKernels):
    """Builds the CPU kernel of a composite; calling it is the `schedule` argument of `lower_kernels`."""

    tiles: CpuTiles

    def name(self, fused: Composite, out: relax.TensorType) -> str:
        return kernel_name(fused, out, self.tiles.amx)

    def recipe(self, fused: Composite, out: relax.TensorType) -> KernelRecipe:
        factory, options = getattr(self, "_" + fused.name)(fused, out)
        if self.tiles.amx and fits_tiles(fused, out):
            factory = _IN_TILES[fused.name]
        return KernelRecipe.of(factory, self.tiles, options | row_formats(fused, out))

    def _linear(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return linear.linear, linear_options(fused, out)

    def _attention(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return attention.attention, attention_options(fused)

    def _norm(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return normalization.norm, {"n": true_columns(fused, out), **fused.attrs}

    def _gate(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return gate.gate, fused.attrs

    def _rotary(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rotary.rotary, rotary_options(fused)

    def _normalize(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return normalization.l2_normalize, {"n": last_dim(out), **fused.attrs}

    def _embedding(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return embedding.embedding, embedding_options(fused, out)

    def _pool(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return pooling.pool, pool_options(fused, out)

    def _cast_rows(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rows.cast_rows, {"columns": last_dim(out)}

    def _tile_rows(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rows.tile_rows, {"columns": last_dim(out)}

    def _untile_rows(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rows.untile_rows, {"columns": last_dim(out)}


def row_formats(fused: Composite, out: relax.TensorType) -> dict[str, RowFormat]:
    """How a composite's rows are stored, by the schedules' name for them."""
    return {role: RowFormat(last_dim(ty), str(ty.dtype)) for role, ty in row_types(fused, out).items()}


def linear_options(fused: Composite, out: relax.TensorType) -> dict[str, Any]:
    """A product's parameters, as its schedules take them."""
    options = {key: value for key, value in fused.attrs.items() if key != "columns"}
    return options | {"k": reduced_columns(fused), "n": true_columns(fused, out)}


def pool_options(fused: Composite, out: relax.TensorType) -> dict[str, Any]:
    """A pooling's; which row a token is, the runtime says."""
    return {"hidden": last_dim(out)} | {key: value for key, value in fused.attrs.items() if key != "token"}


def attention_options(fused: Composite) -> dict[str, Any]:
    """An attention's."""
    options = {key: value for key, value in fused.attrs.items() if key != "columns"}
    options |= dict(zip("qkv", map(tuple, fused.attrs["columns"]), strict=True))
    if has_distances(fused):
        table = fused.tensors[-1].ty
        step = 2 if str(table.dtype) == bf16.PAIR else 1
        options["distance_width"] = last_dim(table) * step // (fused.attrs["heads"] * fused.attrs["head_dim"])
    return options | ({"position_bias": True} if has_position_bias(fused) else {})


def rotary_options(fused: Composite) -> dict[str, Any]:
    """A rotation's."""
    positions, dims = (int(d) for d in shape_of(fused.tensors[2]))
    spans = tuple((int(first), int(heads)) for first, heads in fused.attrs["spans"])
    return fused.attrs | {"spans": spans, "positions": positions, "dims": dims}


def embedding_options(fused: Composite, out: relax.TensorType) -> dict[str, Any]:
    """An embedding's."""
    table = fused.tensors[fused.attrs["tables"]]
    return {"hidden": true_columns(fused, out), "table_type": str(table.ty.dtype)} | fused.attrs


def overwritable(fused: Composite, out: relax.TensorType) -> tuple[int, ...]:
    """Which tensors may be the memory of the output, if they are stored as it is.

    Each of their elements (of a norm, each of their rows) is read by the task that writes it, before it does: the
    residual of a product, the rows that a norm reads, the two columns that a rotation turns.
    """
    candidates = {"linear": (3,), "norm": (0, 1), "normalize": (0,), "rotary": (0,)}.get(fused.name, ())
    if fused.name in ("linear", "norm") and not fused.attrs.get("residual"):
        candidates = tuple(i for i in candidates if i == 0)
    same = (str(out.dtype), [str(d) for d in dims_of(out)])
    return tuple(
        i
        for i in candidates
        if (str(fused.tensors[i].ty.dtype), [str(d) for d in dims_of(fused.tensors[i].ty)]) == same
    )


_IN_TILES: dict[str, Callable[..., tirx.PrimFunc]] = {
    "linear": linear_amx.linear,
    "attention": attention_amx.attention,
}


def inventory(mod: ir.IRModule, kernels: WeightKernels) -> tuple[KernelSpec, ...]:
    """The kernels that `main` calls, before they are lowered: how often, and what one call costs per token.

    kernels: those of the target. A kernel on one row per sequence counts as nothing: next to the tokens there are few.
    """
    calls: Counter[str] = Counter()
    specs: dict[str, KernelSpec] = {}
    batch = dims_of(mod["main"].params[0].ty)[0]
    for fused, out in composites(mod["main"]):
        name = kernels.name(fused, out)
        calls[name] += 1
        per_token = any(v.same_as(batch) for v in tirx.analysis.undefined_vars(dims_of(out)[0]))
        if name not in specs:
            spec = _describe(name, fused, out, per_token, batch)
            specs[name] = replace(spec, recipe=kernels.recipe(fused, out).to_json(), variants=_variants(kernels, name))
    return tuple(replace(spec, calls=calls[name]) for name, spec in specs.items())


def _variants(kernels: WeightKernels, name: str) -> tuple[VariantSpec, ...]:
    return tuple(VariantSpec(dict(v.setting), v.max_rows or 0) for v in kernels.tuned.get(name, ()))


def composites(func: relax.Function) -> Iterable[tuple[Composite, relax.TensorType]]:
    """Every composite that a function calls, in order, with the type of its result."""
    for block in func.body.blocks:
        for binding in block.bindings:
            fused = composite.match(binding.value)
            if fused is not None:
                yield fused, binding.value.ty_args[0]


def _describe(name: str, fused: Composite, out: relax.TensorType, counts: bool, batch: tirx.Var) -> KernelSpec:
    columns = true_columns(fused, out)
    constant = [t for t in fused.tensors if all(isinstance(d, int) for d in shape_of(t))]
    weight_bytes = sum(np.dtype(str(t.ty.dtype)).itemsize * _count(shape_of(t)) for t in constant)
    per_token, per_pair, text = 0.0, 0.0, str(columns)
    if fused.name == "linear":
        k = reduced_columns(fused)
        per_token, text = 2.0 * k * columns, f"{k} -> {columns}"
    elif fused.name == "attention":
        products = 2 + composite.distance_tables(fused)
        per_pair = 2.0 * products * fused.attrs["heads"] * fused.attrs["head_dim"]
        if "window" in fused.attrs:
            per_token, per_pair = per_pair * (2 * fused.attrs["window"] + 1), 0.0
        text = f"{fused.attrs['heads']} heads x {fused.attrs['head_dim']}"
    elif fused.name == "embedding":
        per_token, text = (
            float(columns * fused.attrs["tables"]),
            f"{fused.attrs['tables']} tables x {columns}",
        )
    elif fused.name == "norm":
        per_token = 8.0 * columns
    elif fused.name == "gate":
        per_token = 12.0 * columns
    elif fused.name == "rotary":
        per_token = 3.0 * columns
    row_bytes = _bytes_per_token(fused, out, batch)
    return KernelSpec(name, fused.name, 0, text, per_token if counts else 0.0, per_pair, weight_bytes, row_bytes)


def _bytes_per_token(fused: Composite, out: relax.TensorType, batch: tirx.Var) -> int:
    """What a kernel reads and writes per token at least: each tensor of rows once, and what it gathers from tables."""
    distinct: list[relax.Expr] = []
    for tensor in fused.tensors:
        if not any(tensor.same_as(other) for other in distinct):
            distinct.append(tensor)
    types = [ty for ty in (*(t.ty for t in distinct), out) if dims_of(ty) and batch.same_as(dims_of(ty)[0])]
    tables = int(fused.attrs["tables"]) if fused.name == "embedding" else 0
    gathered = [t.ty for t in fused.tensors[tables : 2 * tables]]
    whole = sum(np.dtype(str(ty.dtype)).itemsize * _count(dims_of(ty)[2:]) for ty in types)
    return whole + sum(np.dtype(str(ty.dtype)).itemsize * last_dim(ty) for ty in gathered)


def _count(shape: list) -> int:
    total = 1
    for d in shape:
        total *= int(d)
    return total
