"""Convert fused ONNX operators of attention: those of ONNX Runtime, and attention and rotary positions of opset 23.

Converters are as in `operators.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from turbo_tvm.frontends.onnx.operands import Attributes, Operator, Results, add_all, operands
from turbo_tvm.passes.rewriter import shape_of

if TYPE_CHECKING:
    from turbo_tvm.frontends.onnx.graph import OnnxGraph

_LOWEST = float(np.finfo(np.float32).min)


def _attention(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert `com.microsoft` Attention, which has the projections inside."""
    x, weight, bias, mask, past, extra = operands(graph, inputs, 6)[:6]
    if past is not None or attrs.get("do_rotary", 0) or attrs.get("past_present_share_buffer", 0):
        return None
    sizes = [int(n) for n in attrs.get("qkv_hidden_sizes", [])] or [int(shape_of(weight)[1]) // 3] * 3
    merged = add_all(graph, graph.emit(relax.op.matmul(x, weight)), bias)
    cuts = [sizes[0], sizes[0] + sizes[1]]
    parts = graph.emit(relax.op.split(merged, cuts, axis=-1))
    q, k, v = (graph.emit(relax.TupleGetItem(parts, i)) for i in range(3))
    return [_attend(graph, (q, k, v), [_mask_bias(graph, mask, q, attrs), extra], attrs)]


def _multi_head_attention(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert `com.microsoft` MultiHeadAttention of projected (batch, length, columns)."""
    q, k, v, bias, mask, extra, past = operands(graph, inputs, 7)[:7]
    if past is not None or k is None or v is None or any(len(shape_of(x)) != 3 for x in (q, k, v)):
        return None
    if bias is not None:
        widths = [int(shape_of(x)[-1]) for x in (q, k, v)]
        parts = graph.emit(relax.op.split(bias, [widths[0], widths[0] + widths[1]], axis=-1))
        q, k, v = (add_all(graph, x, graph.emit(relax.TupleGetItem(parts, i))) for i, x in enumerate((q, k, v)))
    return [_attend(graph, (q, k, v), [_mask_bias(graph, mask, q, attrs), extra], attrs)]


def _mask_bias(graph: OnnxGraph, mask: relax.Expr | None, q: relax.Expr, attrs: Attributes) -> relax.Expr | None:
    """Return what is added to scores, fp32 (batch, 1, 1, length), for a mask of keys; None without one.

    mask: (batch, length), or how many keys there are, (batch,). Raises ValueError for other masks.
    """
    if mask is None:
        return None
    length, rank = shape_of(q)[1], len(shape_of(mask))
    if rank == 1:
        places = graph.emit(relax.op.expand_dims(graph.emit(relax.op.arange(0, length, 1, "int32")), 0))
        counts = graph.emit(relax.op.expand_dims(graph.emit(relax.op.astype(mask, "int32")), 1))
        real = graph.emit(relax.op.less(places, counts))
    elif rank == 2:
        real = graph.emit(relax.op.astype(mask, "bool"))
    else:
        raise ValueError(f"a mask of rank {rank} is not supported; (batch, length) is")
    keys = graph.emit(relax.op.expand_dims(real, [1, 2]))
    low = relax.const(float(attrs.get("mask_filter_value", -10000.0)), "float32")
    return graph.emit(relax.op.where(keys, relax.const(0.0, "float32"), low))


def _attend(graph: OnnxGraph, qkv: Sequence[relax.Expr], biases: list[Any], attrs: Attributes) -> relax.Expr:
    """Return softmax(q k^T * scale + biases) v for (batch, length, heads * columns), in the same layout."""
    heads = int(attrs["num_heads"])
    batch, length = shape_of(qkv[0])[:2]
    split = [graph.emit(relax.op.reshape(x, (*shape_of(x)[:2], heads, shape_of(x)[2] // heads))) for x in qkv]
    scale = float(attrs.get("scale", 0.0)) or None
    causal = _causal(graph, length) if attrs.get("unidirectional", 0) else None
    out = graph.emit(_core(graph, split, [*biases, causal], scale))
    return relax.op.reshape(out, (batch, length, shape_of(qkv[2])[2]))


def _core(graph: OnnxGraph, qkv: list[relax.Expr], biases: list[relax.Expr | None], scale: float | None) -> relax.Expr:
    """Return Relax's attention of (batch, length, heads, columns) with the biases that there are."""
    present = [b for b in biases if b is not None]
    return relax.op.nn.attention(*qkv, bias=add_all(graph, *present) if present else None, scale=scale)


def _causal(graph: OnnxGraph, length: Any) -> relax.Expr:
    """Return what is added to scores of later keys, fp32 (1, 1, length, length)."""
    row = graph.emit(relax.op.arange(0, length, 1, "int64"))
    past = graph.emit(
        relax.op.less_equal(graph.emit(relax.op.expand_dims(row, 0)), graph.emit(relax.op.expand_dims(row, 1)))
    )
    bias = graph.emit(relax.op.where(past, relax.const(0.0, "float32"), relax.const(_LOWEST, "float32")))
    return graph.emit(relax.op.expand_dims(bias, [0, 1]))


def _attention_23(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert ONNX's own Attention, of (batch, heads, length, columns) or (batch, length, heads * columns)."""
    q, k, v, mask, past = operands(graph, inputs, 5)[:5]
    if past is not None or attrs.get("softcap", 0.0) or attrs.get("qk_matmul_output_mode", 0):
        return None
    flat = len(shape_of(q)) == 3
    parts = _heads_apart(graph, (q, k, v), attrs)
    repeats = int(shape_of(parts[0])[2]) // int(shape_of(parts[1])[2])
    if repeats > 1:
        parts[1:] = [graph.emit(relax.op.repeat(x, repeats, axis=2)) for x in parts[1:]]
    causal = _causal(graph, shape_of(parts[0])[1]) if attrs.get("is_causal", 0) else None
    out = graph.emit(_core(graph, parts, [_as_bias(graph, mask), causal], attrs.get("scale")))
    if flat:
        batch, length, heads, columns = shape_of(out)
        return [relax.op.reshape(out, (batch, length, heads * columns))]
    return [relax.op.permute_dims(out, [0, 2, 1, 3])]


def _heads_apart(graph: OnnxGraph, qkv: Sequence[relax.Expr], attrs: Attributes) -> list[relax.Expr]:
    """Return q, k and v of either layout as (batch, length, heads, columns)."""
    if len(shape_of(qkv[0])) != 3:
        return [graph.emit(relax.op.permute_dims(x, [0, 2, 1, 3])) for x in qkv]
    counts = [int(attrs["q_num_heads"]), *[int(attrs["kv_num_heads"])] * 2]
    return [
        graph.emit(relax.op.reshape(x, (*shape_of(x)[:2], n, shape_of(x)[2] // n)))
        for x, n in zip(qkv, counts, strict=True)
    ]


def _as_bias(graph: OnnxGraph, mask: relax.Expr | None) -> relax.Expr | None:
    """Return what is added to scores for a mask, which may be one of booleans."""
    if mask is None or "bool" not in str(mask.ty.dtype):
        return mask
    return graph.emit(relax.op.where(mask, relax.const(0.0, "float32"), relax.const(_LOWEST, "float32")))


def _rotary_23(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert ONNX's RotaryEmbedding of (batch, heads, length, columns), the halves of whose columns are pairs."""
    x, cos, sin, positions = operands(graph, inputs, 4)[:4]
    if attrs.get("interleaved", 0) or attrs.get("rotary_embedding_dim", 0):
        return None
    if len(shape_of(x)) != 4:
        return None
    if positions is not None:
        cos, sin = (graph.emit(relax.op.take(table, positions, axis=0, mode="clip")) for table in (cos, sin))
    cos, sin = (graph.emit(relax.op.expand_dims(table, 1)) for table in (cos, sin))
    parts = graph.emit(relax.op.split(x, 2, axis=-1))
    left, right = (graph.emit(relax.TupleGetItem(parts, i)) for i in range(2))

    def times(a: relax.Expr, b: relax.Expr) -> relax.Expr:
        return graph.emit(relax.op.multiply(a, b))

    real = graph.emit(relax.op.subtract(times(left, cos), times(right, sin)))
    imaginary = graph.emit(relax.op.add(times(left, sin), times(right, cos)))
    return [relax.op.concat([real, imaginary], axis=-1)]


# Converters by domain and operator.
OPERATORS: dict[tuple[str, str], Operator] = {
    ("com.microsoft", "Attention"): _attention,
    ("com.microsoft", "MultiHeadAttention"): _multi_head_attention,
    ("", "Attention"): _attention_23,
    ("", "RotaryEmbedding"): _rotary_23,
}
