"""Where passes and schedules meet: which schedule implements a composite, and what it costs.

The passes know composites, the schedules know loops; the pipeline hands `CpuKernels`, or `CudaKernels` of
`cuda/kernels.py`, to `lower_kernels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from tvm import ir, relax, s_tir, tirx

from turbo_tvm.passes import composite
from turbo_tvm.passes.composite import Composite
from turbo_tvm.passes.plan_memory import OVERWRITES
from turbo_tvm.passes.rewriter import dims_of, shape_of
from turbo_tvm.runtime.manifest import KernelSpec
from turbo_tvm.schedules import (
    attention,
    attention_amx,
    bf16,
    embedding,
    linear,
    linear_amx,
    normalization,
    pooling,
    position_bias,
    rows,
    weights,
)
from turbo_tvm.schedules.cuda.tiles import CudaTiles
from turbo_tvm.schedules.rows import RowFormat
from turbo_tvm.schedules.tiles import CpuTiles

Recipe = tuple[Callable[..., tirx.PrimFunc], dict[str, Any]]  # a schedule and its parameters


class WeightKernels:
    """Builds the kernels that prepare weights, which run on the CPU that compiles, in the layout of `tiles`."""

    def __init__(self, tiles: CpuTiles | CudaTiles):
        self.tiles = tiles

    def _pack_weight(self, fused: Composite, out: relax.TensorType) -> Recipe:
        dtype = {} if fused.attrs.get("pairs") else {"dtype": str(out.dtype)}
        return weights.pack_weight, fused.attrs | dtype

    def _pack_bias(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return weights.pack_bias, fused.attrs

    def _cast_weight(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return weights.cast_weight, {"shape": tuple(fused.attrs["shape"]), "dtype": str(out.dtype)}

    def _toeplitz(self, fused: Composite, out: relax.TensorType) -> Recipe:
        heads, width = dims_of(out)
        return position_bias.toeplitz, {"heads": int(heads), "length": (int(width) + 1) // 2}


class CpuKernels(WeightKernels):
    """Builds the CPU kernel of a composite; calling it is the `schedule` argument of `lower_kernels`."""

    tiles: CpuTiles

    def __call__(self, fused: Composite, out: relax.TensorType) -> tuple[str, tirx.PrimFunc]:
        """The kernel's name, unique for its parameters, and its PrimFunc."""
        factory, options = getattr(self, "_" + fused.name)(fused, out)
        options = options | row_formats(fused, out)
        if self.tiles.amx and fits_tiles(fused, out):
            factory = _IN_TILES[fused.name]
        kernel = build_kernel(factory, self.tiles, options, overwritable(fused, out))
        return kernel_name(fused, out, self.tiles.amx), kernel

    def _linear(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return linear.linear, linear_options(fused, out)

    def _attention(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return attention.attention, attention_options(fused)

    def _norm(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return normalization.layer_norm, {"n": true_columns(fused, out), **fused.attrs}

    def _normalize(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return normalization.l2_normalize, {"n": last_dim(out), **fused.attrs}

    def _embedding(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return embedding.embedding, embedding_options(fused, out)

    def _pool(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return pooling.pool, {"hidden": last_dim(out), **fused.attrs}

    def _cast_rows(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rows.cast_rows, {"columns": last_dim(out)}

    def _tile_rows(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rows.tile_rows, {"columns": last_dim(out)}

    def _untile_rows(self, fused: Composite, out: relax.TensorType) -> Recipe:
        return rows.untile_rows, {"columns": last_dim(out)}


def last_dim(ty: relax.TensorType) -> int:
    """How many columns the rows of that type have."""
    return int(dims_of(ty)[-1])


def row_formats(fused: Composite, out: relax.TensorType) -> dict[str, RowFormat]:
    """How a composite's rows are stored, by the schedules' name for them."""
    return {role: RowFormat(last_dim(ty), str(ty.dtype)) for role, ty in row_types(fused, out).items()}


def linear_options(fused: Composite, out: relax.TensorType) -> dict[str, Any]:
    """A product's parameters, as its schedules take them."""
    options = {key: value for key, value in fused.attrs.items() if key != "columns"}
    return options | {"k": reduced_columns(fused), "n": true_columns(fused, out)}


def attention_options(fused: Composite) -> dict[str, Any]:
    """An attention's."""
    options = {key: value for key, value in fused.attrs.items() if key != "columns"}
    options |= dict(zip("qkv", map(tuple, fused.attrs["columns"]), strict=True))
    return options | ({"position_bias": True} if has_position_bias(fused) else {})


def embedding_options(fused: Composite, out: relax.TensorType) -> dict[str, Any]:
    """An embedding's."""
    table = fused.tensors[fused.attrs["tables"]]
    return {"hidden": true_columns(fused, out), "table_type": str(table.ty.dtype)} | fused.attrs


def build_kernel(
    factory: Callable[..., tirx.PrimFunc],
    tiles: CpuTiles | CudaTiles | None,
    options: dict[str, Any],
    overwrites: tuple[int, ...],
) -> tirx.PrimFunc:
    """A schedule for these parameters, and for these tiles if it takes any."""
    return _build(factory, tiles, tuple(sorted(options.items())), overwrites)


@lru_cache(maxsize=512)
def _build(
    factory: Callable[..., tirx.PrimFunc],
    tiles: CpuTiles | CudaTiles | None,
    options: tuple[tuple[str, Any], ...],
    overwrites: tuple[int, ...],
) -> tirx.PrimFunc:
    """Parsing TVMScript takes up to a second, so models of one process share their kernels."""
    positional = () if tiles is None else (tiles,)
    return _rooted(factory(*positional, **dict(options))).with_attr(OVERWRITES, list(overwrites))


def _rooted(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function inside a root block, which TVM's analyses expect of every function that a graph calls."""
    if isinstance(func.body, s_tir.SBlockRealize):
        return func
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", func.body))
    return tirx.PrimFunc(func.params, root, func.ret_type, func.attrs)


def overwritable(fused: Composite, out: relax.TensorType) -> tuple[int, ...]:
    """Which tensors may be the memory of the output, if they are stored as it is.

    Each of their elements (of a norm, each of their rows) is read by the task that writes it, before it does: the
    residual of a product, the rows that a norm reads.
    """
    candidates = {"linear": (3,), "norm": (0, 1), "normalize": (0,)}.get(fused.name, ())
    if fused.name in ("linear", "norm") and not fused.attrs.get("residual"):
        candidates = tuple(i for i in candidates if i == 0)
    same = (str(out.dtype), [str(d) for d in dims_of(out)])
    return tuple(
        i
        for i in candidates
        if (str(fused.tensors[i].ty.dtype), [str(d) for d in dims_of(fused.tensors[i].ty)]) == same
    )


def has_position_bias(fused: Composite) -> bool:
    """Whether this is an attention with a table over distances behind q, k, v and the bounds."""
    return fused.name == "attention" and len(fused.tensors) > 4


_IN_TILES: dict[str, Callable[..., tirx.PrimFunc]] = {
    "linear": linear_amx.linear,
    "attention": attention_amx.attention,
}


def fits_tiles(fused: Composite, out: relax.TensorType) -> bool:
    """Whether a CPU with AMX runs this in its tiles."""
    if fused.name == "linear":
        return str(fused.tensors[0].ty.dtype) == bf16.STORAGE
    if fused.name == "attention":
        dtypes = str(fused.tensors[0].ty.dtype), str(out.dtype)
        return attention_amx.fits(fused.attrs["head_dim"], *dtypes, has_position_bias(fused))
    return False


def row_types(fused: Composite, out: relax.TensorType) -> dict[str, relax.TensorType]:
    """The types of a composite's rows, by the schedules' name for them, where schedules allow a choice."""
    t = fused.tensors
    extra = {"extra": t[3 if fused.name == "linear" else 1].ty} if fused.attrs.get("residual") else {}
    if fused.name in ("linear", "norm"):
        return {"x": t[0].ty, **extra, "out": out}
    if fused.name == "attention":
        return {"x": t[0].ty, "out": out}
    return {name: ty for name, ty in (("x", t[0].ty), ("out", out)) if name in _CHOICES.get(fused.name, ())}


_CHOICES = {"normalize": ("x", "out"), "embedding": ("out",), "pool": ("x",), "cast_rows": ("out",)}


def true_columns(fused: Composite, out: relax.TensorType) -> int:
    """How many columns of a composite's output rows are used; the rows may be wider."""
    if fused.name == "linear":
        return int(fused.attrs.get("columns", last_dim(out)))
    if fused.name == "norm":
        return int(shape_of(fused.tensors[-1])[0])
    if fused.name == "embedding":
        return int(shape_of(fused.tensors[fused.attrs["tables"]])[1])
    if fused.name == "attention":
        return fused.attrs["heads"] * fused.attrs["head_dim"]
    return last_dim(out)


def reduced_columns(linear: Composite) -> int:
    """The k of a product: how many columns of x it sums over."""
    steps = int(shape_of(linear.tensors[1])[1])
    return steps * (2 if str(linear.tensors[1].ty.dtype) == bf16.PAIR else 1)


def kernel_name(fused: Composite, out: relax.TensorType, amx: bool = False) -> str:
    """A readable name that says everything the kernel's code depends on: `linear_768x3072_gelu`.

    amx: whether what fits AMX tiles runs in them.
    """
    options = [_option(key, value) for key, value in sorted(fused.attrs.items()) if key not in _IN_SHAPE]
    extra = ["bias"] if has_position_bias(fused) else []
    formats = [*_formats(fused, out), *(["amx"] if amx and fits_tiles(fused, out) else [])]
    text = "_".join([fused.name, *_shape(fused, out), *(o for o in options if o), *extra, *formats])
    return "".join(c if c.isalnum() or c == "_" else "_" for c in text)


_IN_SHAPE = ("k", "n", "shape", "columns", "heads", "head_dim", "max_length", "scale")


def _shape(fused: Composite, out: relax.TensorType) -> list[str]:
    columns = true_columns(fused, out)
    if fused.name == "linear":
        return [f"{reduced_columns(fused)}x{columns}"]
    if fused.name in ("pack_weight", "pack_bias"):
        return ["x".join(str(fused.attrs[key]) for key in ("k", "n") if key in fused.attrs)]
    if fused.name == "cast_weight":
        return ["x".join(str(d) for d in fused.attrs["shape"])]
    return [_attention_shape(fused)] if fused.name == "attention" else [str(columns)]


def _formats(fused: Composite, out: relax.TensorType) -> list[str]:
    """How rows are stored, where that is not fp32 and as wide as their columns."""
    natural = {"x": true_columns(fused, out), "extra": true_columns(fused, out)}
    natural |= {"out": natural["x"]}
    if fused.name == "linear":
        natural["x"] = reduced_columns(fused)
    types = row_types(fused, out)
    words = {"x": "from", "extra": "plus", "out": "to"}
    widths = {role: int(dims_of(ty)[-1]) for role, ty in types.items()}
    wide = [f"{words[r]}{w}" for r, w in widths.items() if w > natural[r] and (fused.name, r) != ("attention", "x")]
    stored = {role: str(ty.dtype) for role, ty in types.items()}
    if fused.name == "embedding":
        stored["tables"] = str(fused.tensors[fused.attrs["tables"]].ty.dtype)
    if fused.name in ("pack_weight", "cast_weight"):
        stored = {"out": str(out.dtype)}
    in_fp32 = [role for role, dtype in stored.items() if dtype not in _SHORT]
    if len(in_fp32) == len(stored):
        return wide
    word = next(_SHORT[dtype] for dtype in stored.values() if dtype in _SHORT)
    return [*wide, word, *(f"{role}_fp32" for role in in_fp32)]


_SHORT = {bf16.STORAGE: "bf16", "float16": "fp16"}


def _attention_shape(fused: Composite) -> str:
    a = fused.attrs
    inner = a["heads"] * a["head_dim"]
    width = a["columns"][0][0]
    known = {"merged": [[3 * inner, i * inner] for i in range(3)], "separate": [[inner, 0]] * 3}
    known[f"merged_in{width}"] = [[width, i * inner] for i in range(3)]
    spelt = "_".join(f"{width}at{offset}" for width, offset in a["columns"])
    merged = next((word for word, columns in known.items() if columns == a["columns"]), spelt)
    scale, usual = np.float32(a["scale"]), np.float32(a["head_dim"] ** -0.5)
    extra = "" if scale == usual else f"_scale{scale:.9g}"
    return f"{a['heads']}x{a['head_dim']}_{merged}_max{a['max_length']}{extra}"


def _option(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    if isinstance(value, str):
        return value
    return key if value is True else f"{key}{value:g}"


def inventory(mod: ir.IRModule, amx: bool = False) -> tuple[KernelSpec, ...]:
    """The kernels that `main` calls, before they are lowered: how often, and what one call costs per token.

    amx: as for `kernel_name`. A kernel on one row per sequence counts as nothing: next to the tokens there are few.
    """
    calls: Counter[str] = Counter()
    specs: dict[str, KernelSpec] = {}
    batch = dims_of(mod["main"].params[0].ty)[0]
    for fused, out in composites(mod["main"]):
        name = kernel_name(fused, out, amx)
        calls[name] += 1
        per_token = any(v.same_as(batch) for v in tirx.analysis.undefined_vars(dims_of(out)[0]))
        specs.setdefault(name, _describe(name, fused, out, per_token, batch))
    return tuple(replace(spec, calls=calls[name]) for name, spec in specs.items())


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
        per_pair = 4.0 * fused.attrs["heads"] * fused.attrs["head_dim"]
        text = f"{fused.attrs['heads']} heads x {fused.attrs['head_dim']}"
    elif fused.name == "embedding":
        per_token, text = (
            float(columns * fused.attrs["tables"]),
            f"{fused.attrs['tables']} tables x {columns}",
        )
    elif fused.name == "norm":
        per_token = 8.0 * columns
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
