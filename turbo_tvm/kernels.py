"""Where passes and schedules meet: which schedule implements a composite, and what it costs.

The passes know composites, the schedules know loops; the pipeline hands `CpuKernels` to `lower_kernels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from tvm import ir, relax, s_tir, tirx

from turbo_tvm.passes import composite
from turbo_tvm.passes.composite import Composite
from turbo_tvm.passes.rewriter import dims_of, shape_of
from turbo_tvm.runtime.manifest import KernelSpec
from turbo_tvm.schedules import attention, embedding, linear, normalization, pooling, position_bias, rows
from turbo_tvm.schedules.tiles import CpuTiles

Recipe = tuple[Callable[..., tirx.PrimFunc], dict[str, Any]]  # a schedule and its parameters


class CpuKernels:
    """Builds the CPU kernel of a composite; calling it is the `schedule` argument of `lower_kernels`."""

    def __init__(self, tiles: CpuTiles):
        self.tiles = tiles

    def __call__(self, fused: Composite, out: relax.TensorType) -> tuple[str, tirx.PrimFunc]:
        """The kernel's name, unique for its parameters, and its PrimFunc."""
        factory, options = getattr(self, "_" + fused.name)(fused, dims_of(out))
        return kernel_name(fused, out), _build(factory, self.tiles, tuple(sorted(options.items())))

    def _linear(self, fused: Composite, out: list) -> Recipe:
        options = {key: value for key, value in fused.attrs.items() if key != "columns"}
        options |= {"k": int(shape_of(fused.tensors[1])[1]), "n": int(fused.attrs.get("columns", out[-1]))}
        return linear.linear, options | {"x_width": int(shape_of(fused.tensors[0])[-1]), "out_width": int(out[-1])}

    def _pack_weight(self, fused: Composite, out: list) -> Recipe:
        return linear.pack_weight, fused.attrs

    def _pack_bias(self, fused: Composite, out: list) -> Recipe:
        return linear.pack_bias, fused.attrs

    def _attention(self, fused: Composite, out: list) -> Recipe:
        options = {key: value for key, value in fused.attrs.items() if key != "columns"}
        options |= dict(zip("qkv", map(tuple, fused.attrs["columns"]), strict=True))
        return attention.attention, options | {"position_bias": has_position_bias(fused)}

    def _norm(self, fused: Composite, out: list) -> Recipe:
        return normalization.layer_norm, {"n": int(out[-1]), **fused.attrs}

    def _normalize(self, fused: Composite, out: list) -> Recipe:
        return normalization.l2_normalize, {"n": int(out[-1]), **fused.attrs}

    def _embedding(self, fused: Composite, out: list) -> Recipe:
        return embedding.embedding, {"hidden": int(out[-1]), **fused.attrs}

    def _pool(self, fused: Composite, out: list) -> Recipe:
        return pooling.pool, {"hidden": int(out[-1]), **fused.attrs}

    def _toeplitz(self, fused: Composite, out: list) -> Recipe:
        return position_bias.toeplitz, {"heads": int(out[0]), "length": (int(out[1]) + 1) // 2}

    def _tile_rows(self, fused: Composite, out: list) -> Recipe:
        return rows.tile_rows, {"columns": int(out[-1])}

    def _untile_rows(self, fused: Composite, out: list) -> Recipe:
        return rows.untile_rows, {"columns": int(out[-1])}


@lru_cache(maxsize=512)
def _build(
    factory: Callable[..., tirx.PrimFunc], tiles: CpuTiles, options: tuple[tuple[str, Any], ...]
) -> tirx.PrimFunc:
    """A schedule for these parameters; parsing TVMScript takes up to a second, so models of one process share them."""
    return _rooted(factory(tiles, **dict(options)))


def _rooted(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function inside a root block, which TVM's analyses expect of every function that a graph calls."""
    if isinstance(func.body, s_tir.SBlockRealize):
        return func
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", func.body))
    return tirx.PrimFunc(func.params, root, func.ret_type, func.attrs)


def has_position_bias(fused: Composite) -> bool:
    """Whether this is an attention with a table over distances behind q, k, v and the bounds."""
    return fused.name == "attention" and len(fused.tensors) > 4


def kernel_name(fused: Composite, out: relax.TensorType) -> str:
    """A readable name that says everything the kernel's code depends on: `linear_768x3072_gelu`."""
    shape = _shape(fused, out)
    options = [_option(key, value) for key, value in sorted(fused.attrs.items()) if key not in _IN_SHAPE]
    extra = ["bias"] if has_position_bias(fused) else []
    text = "_".join([fused.name, shape, *(o for o in options if o), *extra])
    return "".join(c if c.isalnum() or c == "_" else "_" for c in text)


_IN_SHAPE = ("k", "n", "columns", "heads", "head_dim", "max_length", "scale")


def _shape(fused: Composite, out: relax.TensorType) -> str:
    columns = dims_of(out)[-1]
    if fused.name == "linear":
        k, n = shape_of(fused.tensors[1])[1], fused.attrs.get("columns", columns)
        wide_x, wide_out = shape_of(fused.tensors[0])[-1] > k, columns > n
        x_width = shape_of(fused.tensors[0])[-1]
        return f"{k}x{n}" + (f"_from{x_width}" if wide_x else "") + (f"_to{columns}" if wide_out else "")
    if fused.name in ("pack_weight", "pack_bias"):
        return "x".join(str(fused.attrs[key]) for key in ("k", "n") if key in fused.attrs)
    if fused.name == "attention":
        return _attention_shape(fused)
    return str(columns)


def _attention_shape(fused: Composite) -> str:
    a = fused.attrs
    inner = a["heads"] * a["head_dim"]
    known = {"merged": [[3 * inner, i * inner] for i in range(3)], "separate": [[inner, 0]] * 3}
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


def inventory(mod: ir.IRModule) -> tuple[KernelSpec, ...]:
    """The kernels that `main` calls, before they are lowered: how often, and what one call costs per token.

    A kernel on one row per sequence counts as nothing: next to the tokens there are few of them.
    """
    calls: Counter[str] = Counter()
    specs: dict[str, KernelSpec] = {}
    batch = dims_of(mod["main"].params[0].ty)[0]
    for fused, out in composites(mod["main"]):
        name = kernel_name(fused, out)
        calls[name] += 1
        per_token = any(v.same_as(batch) for v in tirx.analysis.undefined_vars(dims_of(out)[0]))
        specs.setdefault(name, _describe(name, fused, out, per_token))
    return tuple(
        KernelSpec(s.name, s.family, calls[name], s.shapes, s.flops_per_token, s.flops_per_pair, s.bytes_weights)
        for name, s in specs.items()
    )


def composites(func: relax.Function) -> Iterable[tuple[Composite, relax.TensorType]]:
    """Every composite that a function calls, in order, with the type of its result."""
    for block in func.body.blocks:
        for binding in block.bindings:
            fused = composite.match(binding.value)
            if fused is not None:
                yield fused, binding.value.ty_args[0]


def _describe(name: str, fused: Composite, out: relax.TensorType, counts: bool) -> KernelSpec:
    columns = int(fused.attrs.get("columns", 0) if fused.name == "linear" else 0) or int(dims_of(out)[-1])
    weights = [shape_of(t) for t in fused.tensors]
    weight_bytes = sum(4 * _count(shape) for shape in weights if all(isinstance(d, int) for d in shape))
    per_token, per_pair, text = 0.0, 0.0, str(columns)
    if fused.name == "linear":
        k = int(weights[1][1])
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
    return KernelSpec(name, fused.name, 0, text, per_token if counts else 0.0, per_pair, weight_bytes)


def _count(shape: list) -> int:
    total = 1
    for d in shape:
        total *= int(d)
    return total
