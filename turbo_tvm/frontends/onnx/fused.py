"""Fused ONNX operators, in terms of Relax: those of ONNX Runtime's optimisers, and attention and norms of opset 23.

Of ONNX Runtime: `com.microsoft` SkipLayerNormalization, EmbedLayerNormalization, BiasGelu, Attention and so on, as its
documentation of contrib operators defines them. Functions are as in `onnx_operators.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from turbo_tvm.passes.rewriter import shape_of

if TYPE_CHECKING:
    from turbo_tvm.frontends.onnx.graph import OnnxGraph

Results = Sequence[Any] | None
Attributes = Mapping[str, Any]
Operator = Callable[["OnnxGraph", list[Any], Attributes], Results]

_LOWEST = float(np.finfo(np.float32).min)


def _operands(graph: OnnxGraph, inputs: list[Any], count: int) -> list[Any]:
    """The first inputs as expressions, with None for those that are missing."""
    given = [None if x is None else graph.expression(x) for x in inputs]
    return given + [None] * (count - len(given))


def _sum(graph: OnnxGraph, *terms: relax.Expr | None) -> relax.Expr:
    present = [t for t in terms if t is not None]
    total = present[0]
    for term in present[1:]:
        total = graph.emit(relax.op.add(total, term))
    return total


# Norms


def _skip_layer_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, skip, gamma, beta, bias = _operands(graph, inputs, 5)
    total = _sum(graph, x, bias, skip)
    normal = graph.emit(_layer_norm(gamma, beta, total, attrs.get("epsilon", 1e-12)))
    return [normal, None, None, total]


def _layer_norm(gamma: relax.Expr, beta: relax.Expr | None, x: relax.Expr, eps: float) -> relax.Expr:
    beta = relax.const(np.zeros(shape_of(gamma), np.float32)) if beta is None else beta
    return relax.op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=eps)


def _skip_rms_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, skip, gamma, bias = _operands(graph, inputs, 4)
    total = _sum(graph, x, bias, skip)
    return [graph.emit(_rms(total, gamma, attrs.get("epsilon", 1e-12))), None, None, total]


def _rms_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, gamma = _operands(graph, inputs, 2)[:2]
    if attrs.get("axis", -1) not in (-1, len(shape_of(x)) - 1):
        return None
    return [_rms(x, gamma, attrs.get("epsilon", 1e-5))]


def _rms(x: relax.Expr, gamma: relax.Expr, eps: float) -> relax.Expr:
    return relax.op.nn.rms_norm(x, gamma, axes=[-1], epsilon=eps)


def _embed_layer_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Word, position and segment look-ups, their norm, and how many tokens are under the mask."""
    ids, segments, words, places, kinds, gamma, beta, mask, positions = _operands(graph, inputs, 9)
    batch, length = shape_of(ids)
    if positions is None:
        row = graph.emit(relax.op.arange(0, length, 1, "int64"))
        positions = graph.emit(relax.op.broadcast_to(graph.emit(relax.op.expand_dims(row, 0)), (batch, length)))
    looked_up = [(words, ids), (places, positions), *([(kinds, segments)] if segments is not None else [])]
    terms = [graph.emit(relax.op.take(table, index, axis=0, mode="clip")) for table, index in looked_up]
    total = _sum(graph, terms[0], *terms[2:], terms[1])
    counted = None if mask is None else graph.emit(relax.op.sum(mask, axis=1))
    return [graph.emit(_layer_norm(gamma, beta, total, attrs.get("epsilon", 1e-12))), counted, total]


# Activations


def _bias_gelu(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    return [relax.op.nn.gelu(_sum(graph, *_operands(graph, inputs, 2)))]


def _fast_gelu(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    return [relax.op.nn.gelu_tanh(_sum(graph, *_operands(graph, inputs, 2)))]


def _quick_gelu(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x = graph.expression(inputs[0])
    scaled = graph.emit(relax.op.multiply(x, relax.const(float(attrs.get("alpha", 1.702)), "float32")))
    return [relax.op.multiply(x, graph.emit(relax.op.sigmoid(scaled)))]


# Products


def _fused_matmul(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    if attrs.get("transBatchA", 0) or attrs.get("transBatchB", 0):
        return None
    a, b = _operands(graph, inputs, 2)
    a, b = (_transposed(graph, x) if attrs.get(f"trans{k}", 0) else x for x, k in ((a, "A"), (b, "B")))
    alpha = float(attrs.get("alpha", 1.0))
    product = graph.emit(relax.op.matmul(a, b))
    return [product if alpha == 1.0 else relax.op.multiply(product, relax.const(alpha, "float32"))]


def _transposed(graph: OnnxGraph, x: relax.Expr) -> relax.Expr:
    rank = len(shape_of(x))
    return graph.emit(relax.op.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2]))


_ACTIVATIONS: dict[bytes, Callable[[relax.Expr], relax.Expr]] = {
    b"Tanh": relax.op.tanh,
    b"Relu": relax.op.nn.relu,
    b"Sigmoid": relax.op.sigmoid,
}


def _fused_gemm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """A Gemm and its activation."""
    activation = _ACTIVATIONS.get(attrs.get("activation", b""))
    if activation is None or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return None
    a, b, c = _operands(graph, inputs, 3)
    a, b = (_transposed(graph, x) if attrs.get(f"trans{k}", 0) else x for x, k in ((a, "A"), (b, "B")))
    return [activation(_sum(graph, graph.emit(relax.op.matmul(a, b)), c))]


# Attention


def _attention(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """`com.microsoft` Attention: the projections are inside."""
    x, weight, bias, mask, past, extra = _operands(graph, inputs, 6)[:6]
    if past is not None or attrs.get("do_rotary", 0) or attrs.get("past_present_share_buffer", 0):
        return None
    sizes = [int(n) for n in attrs.get("qkv_hidden_sizes", [])] or [int(shape_of(weight)[1]) // 3] * 3
    merged = _sum(graph, graph.emit(relax.op.matmul(x, weight)), bias)
    cuts = [sizes[0], sizes[0] + sizes[1]]
    parts = graph.emit(relax.op.split(merged, cuts, axis=-1))
    q, k, v = (graph.emit(relax.TupleGetItem(parts, i)) for i in range(3))
    biases = [_mask_bias(graph, mask, q, attrs), extra]
    return [_attend(graph, q, k, v, biases, attrs, bool(attrs.get("unidirectional", 0)))]


def _multi_head_attention(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """`com.microsoft` MultiHeadAttention of projected (batch, length, columns)."""
    q, k, v, bias, mask, extra, past = _operands(graph, inputs, 7)[:7]
    if past is not None or k is None or v is None or any(len(shape_of(x)) != 3 for x in (q, k, v)):
        return None
    if bias is not None:
        widths = [int(shape_of(x)[-1]) for x in (q, k, v)]
        parts = graph.emit(relax.op.split(bias, [widths[0], widths[0] + widths[1]], axis=-1))
        q, k, v = (_sum(graph, x, graph.emit(relax.TupleGetItem(parts, i))) for i, x in enumerate((q, k, v)))
    biases = [_mask_bias(graph, mask, q, attrs), extra]
    return [_attend(graph, q, k, v, biases, attrs, bool(attrs.get("unidirectional", 0)))]


def _mask_bias(graph: OnnxGraph, mask: relax.Expr | None, q: relax.Expr, attrs: Attributes) -> relax.Expr | None:
    """The mask of keys, (batch, length), or how many there are, (batch,), as what is added to scores."""
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


def _attend(
    graph: OnnxGraph,
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    biases: list[relax.Expr | None],
    attrs: Attributes,
    causal: bool,
) -> relax.Expr:
    """softmax(q k^T * scale + biases) v of (batch, length, heads * columns), in the same layout."""
    heads = int(attrs["num_heads"])
    batch, length = shape_of(q)[:2]
    split = [graph.emit(relax.op.reshape(x, (*shape_of(x)[:2], heads, shape_of(x)[2] // heads))) for x in (q, k, v)]
    scale = float(attrs.get("scale", 0.0)) or None
    out = graph.emit(_core(graph, split, [*biases, _causal(graph, length) if causal else None], scale))
    return relax.op.reshape(out, (batch, length, shape_of(v)[2]))


def _core(graph: OnnxGraph, qkv: list[relax.Expr], biases: list[relax.Expr | None], scale: float | None) -> relax.Expr:
    present = [b for b in biases if b is not None]
    return relax.op.nn.attention(*qkv, bias=_sum(graph, *present) if present else None, scale=scale)


def _causal(graph: OnnxGraph, length: Any) -> relax.Expr:
    row = graph.emit(relax.op.arange(0, length, 1, "int64"))
    past = graph.emit(
        relax.op.less_equal(graph.emit(relax.op.expand_dims(row, 0)), graph.emit(relax.op.expand_dims(row, 1)))
    )
    bias = graph.emit(relax.op.where(past, relax.const(0.0, "float32"), relax.const(_LOWEST, "float32")))
    return graph.emit(relax.op.expand_dims(bias, [0, 1]))


def _attention_23(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """ONNX's own Attention, of (batch, heads, length, columns) or (batch, length, heads * columns)."""
    q, k, v, mask, past = _operands(graph, inputs, 5)[:5]
    if past is not None or attrs.get("softcap", 0.0) or attrs.get("qk_matmul_output_mode", 0):
        return None
    flat = len(shape_of(q)) == 3
    if flat:
        counts = [int(attrs["q_num_heads"]), *[int(attrs["kv_num_heads"])] * 2]
        parts = [
            graph.emit(relax.op.reshape(x, (*shape_of(x)[:2], n, shape_of(x)[2] // n)))
            for x, n in zip((q, k, v), counts, strict=True)
        ]
    else:
        parts = [graph.emit(relax.op.permute_dims(x, [0, 2, 1, 3])) for x in (q, k, v)]
    repeats = int(shape_of(parts[0])[2]) // int(shape_of(parts[1])[2])
    if repeats > 1:
        parts[1:] = [graph.emit(relax.op.repeat(x, repeats, axis=2)) for x in parts[1:]]
    causal = _causal(graph, shape_of(parts[0])[1]) if attrs.get("is_causal", 0) else None
    out = graph.emit(_core(graph, parts, [_as_bias(graph, mask), causal], attrs.get("scale")))
    if flat:
        batch, length, heads, columns = shape_of(out)
        return [relax.op.reshape(out, (batch, length, heads * columns))]
    return [relax.op.permute_dims(out, [0, 2, 1, 3])]


def _as_bias(graph: OnnxGraph, mask: relax.Expr | None) -> relax.Expr | None:
    if mask is None or "bool" not in str(mask.ty.dtype):
        return mask
    return graph.emit(relax.op.where(mask, relax.const(0.0, "float32"), relax.const(_LOWEST, "float32")))


def _rotary_23(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """ONNX's RotaryEmbedding of (batch, heads, length, columns), the halves of whose columns are pairs."""
    x, cos, sin, positions = _operands(graph, inputs, 4)[:4]
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


def _plain_layer_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, gamma, beta = _operands(graph, inputs, 3)
    if attrs.get("axis", -1) not in (-1, len(shape_of(x)) - 1):
        return None
    return [_layer_norm(gamma, beta, x, attrs.get("epsilon", 1e-5))]


_MICROSOFT: dict[str, Operator] = {
    "LayerNormalization": _plain_layer_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "BiasGelu": _bias_gelu,
    "Gelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "FusedMatMul": _fused_matmul,
    "FusedGemm": _fused_gemm,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
}

OPERATORS: dict[tuple[str, str], Operator] = {
    **{("com.microsoft", name): rule for name, rule in _MICROSOFT.items()},
    ("", "LayerNormalization"): _plain_layer_norm,
    ("", "RMSNormalization"): _rms_norm,
    ("", "Attention"): _attention_23,
    ("", "RotaryEmbedding"): _rotary_23,
}
