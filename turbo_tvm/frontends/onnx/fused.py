"""Convert fused ONNX operators: those of ONNX Runtime's optimisers, and norms of opset 23.

Those of ONNX Runtime are `com.microsoft` SkipLayerNormalization, EmbedLayerNormalization, BiasGelu and so on, as its
documentation of contrib operators defines them. Converters are as in `operators.py`; attention is in
`fused_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from turbo_tvm.frontends.onnx import fused_attention
from turbo_tvm.frontends.onnx.operands import Attributes, Operator, Results, add_all, operands
from turbo_tvm.passes.rewriter import shape_of

if TYPE_CHECKING:
    from turbo_tvm.frontends.onnx.graph import OnnxGraph

# Norms


def _skip_layer_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, skip, gamma, beta, bias = operands(graph, inputs, 5)
    total = add_all(graph, x, bias, skip)
    normal = graph.emit(_layer_norm(gamma, beta, total, attrs.get("epsilon", 1e-12)))
    return [normal, None, None, total]


def _layer_norm(gamma: relax.Expr, beta: relax.Expr | None, x: relax.Expr, eps: float) -> relax.Expr:
    beta = relax.const(np.zeros(shape_of(gamma), np.float32)) if beta is None else beta
    return relax.op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=eps)


def _skip_rms_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, skip, gamma, bias = operands(graph, inputs, 4)
    total = add_all(graph, x, bias, skip)
    return [graph.emit(_rms(total, gamma, attrs.get("epsilon", 1e-12))), None, None, total]


def _rms_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, gamma = operands(graph, inputs, 2)[:2]
    if attrs.get("axis", -1) not in (-1, len(shape_of(x)) - 1):
        return None
    return [_rms(x, gamma, attrs.get("epsilon", 1e-5))]


def _rms(x: relax.Expr, gamma: relax.Expr, eps: float) -> relax.Expr:
    return relax.op.nn.rms_norm(x, gamma, axes=[-1], epsilon=eps)


def _embed_layer_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    """Convert the look-ups of words, positions and token types, their sum's norm, and the count of real tokens."""
    ids, segments, words, places, kinds, gamma, beta, mask, positions = operands(graph, inputs, 9)
    batch, length = shape_of(ids)
    if positions is None:
        row = graph.emit(relax.op.arange(0, length, 1, "int64"))
        positions = graph.emit(relax.op.broadcast_to(graph.emit(relax.op.expand_dims(row, 0)), (batch, length)))
    looked_up = [(words, ids), (places, positions), *([(kinds, segments)] if segments is not None else [])]
    terms = [graph.emit(relax.op.take(table, index, axis=0, mode="clip")) for table, index in looked_up]
    total = add_all(graph, terms[0], *terms[2:], terms[1])
    counted = None if mask is None else graph.emit(relax.op.sum(mask, axis=1))
    return [graph.emit(_layer_norm(gamma, beta, total, attrs.get("epsilon", 1e-12))), counted, total]


# Activations


def _bias_gelu(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    return [relax.op.nn.gelu(add_all(graph, *operands(graph, inputs, 2)))]


def _fast_gelu(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    return [relax.op.nn.gelu_tanh(add_all(graph, *operands(graph, inputs, 2)))]


def _quick_gelu(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x = graph.expression(inputs[0])
    scaled = graph.emit(relax.op.multiply(x, relax.const(float(attrs.get("alpha", 1.702)), "float32")))
    return [relax.op.multiply(x, graph.emit(relax.op.sigmoid(scaled)))]


# Products


def _fused_matmul(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    if attrs.get("transBatchA", 0) or attrs.get("transBatchB", 0):
        return None
    a, b = operands(graph, inputs, 2)
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
    """Convert a Gemm and its activation."""
    activation = _ACTIVATIONS.get(attrs.get("activation", b""))
    if activation is None or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return None
    a, b, c = operands(graph, inputs, 3)
    a, b = (_transposed(graph, x) if attrs.get(f"trans{k}", 0) else x for x, k in ((a, "A"), (b, "B")))
    return [activation(add_all(graph, graph.emit(relax.op.matmul(a, b)), c))]


def _plain_layer_norm(graph: OnnxGraph, inputs: list[Any], attrs: Attributes) -> Results:
    x, gamma, beta = operands(graph, inputs, 3)
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
}

# Converters by domain and operator.
OPERATORS: dict[tuple[str, str], Operator] = {
    **{("com.microsoft", name): rule for name, rule in _MICROSOFT.items()},
    ("", "LayerNormalization"): _plain_layer_norm,
    ("", "RMSNormalization"): _rms_norm,
    **fused_attention.OPERATORS,
}
