"""What a composite's kernel is called, and what its shapes mean.

A name says everything that the kernel's code depends on: `linear_768x3072_gelu_bf16`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from turbo_tvm.passes.composite import Composite, distance_tables
from turbo_tvm.passes.rewriter import dims_of, shape_of
from turbo_tvm.schedules.cpu import attention_amx, bf16


def last_dim(ty: relax.TensorType) -> int:
    """How many columns the rows of that type have."""
    return int(dims_of(ty)[-1])


def has_position_bias(fused: Composite) -> bool:
    """Whether this is an attention with a table over distances behind q, k, v and the bounds."""
    return fused.name == "attention" and len(fused.tensors) > 4 + distance_tables(fused)


def has_distances(fused: Composite) -> bool:
    """Whether this is an attention with tables over distances that tokens are multiplied with, the last tensors."""
    return fused.name == "attention" and distance_tables(fused) > 0


def fits_tiles(fused: Composite, out: relax.TensorType) -> bool:
    """Whether a CPU with AMX runs this in its tiles."""
    if fused.name == "linear":
        return str(fused.tensors[0].ty.dtype) == bf16.STORAGE
    if fused.name == "attention":
        dtypes = str(fused.tensors[0].ty.dtype), str(out.dtype)
        plain = not has_position_bias(fused) and not has_distances(fused)
        return plain and attention_amx.fits(fused.attrs["head_dim"], *dtypes)
    return False


def row_types(fused: Composite, out: relax.TensorType) -> dict[str, relax.TensorType]:
    """The types of a composite's rows, by the schedules' name for them, where schedules allow a choice."""
    t = fused.tensors
    extra = {"extra": t[3 if fused.name == "linear" else 1].ty} if fused.attrs.get("residual") else {}
    if fused.name in ("linear", "norm", "gate", "rotary"):
        return {"x": t[0].ty, **extra, "out": out}
    if fused.name == "attention":
        return {"x": t[0].ty, "out": out}
    return {name: ty for name, ty in (("x", t[0].ty), ("out", out)) if name in _CHOICES.get(fused.name, ())}


_CHOICES = {"normalize": ("x", "out"), "embedding": ("out",), "pool": ("x",), "cast_rows": ("out",)}


def true_columns(fused: Composite, out: relax.TensorType) -> int:
    """How many columns of a composite's output rows are used; the rows may be wider."""
    if fused.name == "linear":
        return int(fused.attrs.get("columns", last_dim(out)))
    if fused.name in ("gate", "rotary"):
        return int(fused.attrs["columns"])
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


_IN_SHAPE = ("k", "n", "shape", "columns", "heads", "head_dim", "max_length", "scale", "spans", "token", "width")


def _shape(fused: Composite, out: relax.TensorType) -> list[str]:
    columns = true_columns(fused, out)
    if fused.name == "linear":
        return [f"{reduced_columns(fused)}x{columns}"]
    if fused.name in ("pack_weight", "pack_bias"):
        return ["x".join(str(fused.attrs[key]) for key in ("k", "n") if key in fused.attrs)]
    if fused.name == "pack_distances":
        return ["x".join(str(fused.attrs[key]) for key in ("heads", "head_dim", "columns", "width"))]
    if fused.name == "cast_weight":
        return ["x".join(str(d) for d in fused.attrs["shape"])]
    if fused.name == "rotary":
        return [_rotary_shape(fused)]
    return [_attention_shape(fused)] if fused.name == "attention" else [str(columns)]


def _formats(fused: Composite, out: relax.TensorType) -> list[str]:
    """How rows are stored, where that is not fp32 and as wide as their columns."""
    natural = {"x": true_columns(fused, out), "extra": true_columns(fused, out)}
    natural |= {"out": natural["x"]}
    if fused.name == "linear":
        natural["x"] = reduced_columns(fused)
    if fused.name == "gate":
        natural["x"] *= 2
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


def _rotary_shape(fused: Composite) -> str:
    positions, dims = (int(d) for d in shape_of(fused.tensors[2]))
    spans = "_".join(f"{heads}at{first}" for first, heads in fused.attrs["spans"])
    return f"{true_columns(fused, fused.tensors[0].ty)}_{spans}x{fused.attrs['head_dim']}_turned{dims}_max{positions}"


def _option(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    if isinstance(value, str):
        return value
    return key if value is True else f"{key}{value:g}"
