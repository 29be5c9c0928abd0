"""Convert PyTorch operators that TVM's importer gets wrong, or not at all.

Its attention leaves out `scale` and grouped heads, its layer norm wants gain and shift, its repetition takes
no symbolic count. A converter takes a node of the exported graph and TVM's importer, whose `env` holds the expressions
made so far, and returns what the node becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, tirx

from turbo_tvm.frontends.tile import tile
from turbo_tvm.passes.rewriter import shape_of

Converter = Callable[[Any, Any], relax.Var]


def _argument(node: Any, index: int, name: str, default: Any = None) -> Any:
    """Return an operator's argument, by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _attention(node: Any, importer: Any) -> relax.Var:
    """Convert aten.scaled_dot_product_attention of (batch, heads, length, head_dim)."""
    emit = importer.block_builder.emit
    q, k, v = (importer.env[arg] for arg in node.args[:3])
    if len(shape_of(q)) != 4:
        raise ValueError(f"scaled_dot_product_attention on {len(shape_of(q))} dimensions, not on 4")
    if _argument(node, 4, "dropout_p", 0.0):
        raise ValueError("scaled_dot_product_attention with dropout")
    if node.kwargs.get("enable_gqa", False):
        groups = shape_of(q)[1] // shape_of(k)[1]
        k, v = (emit(relax.op.repeat(x, groups, axis=1)) for x in (k, v))
    bias = _argument(node, 3, "attn_mask")
    bias = importer.env[bias] if bias is not None else None
    if bias is not None and str(bias.ty.dtype) == "bool":
        bias = emit(relax.op.where(bias, relax.const(0.0, "float32"), relax.const(-np.inf, "float32")))
    scale = node.kwargs.get("scale")
    q, k, v = (emit(relax.op.permute_dims(x, [0, 2, 1, 3])) for x in (q, k, v))
    out = relax.op.nn.attention(
        q,
        k,
        v,
        bias=bias,
        scale=tirx.FloatImm("float32", float(scale)) if scale is not None else None,
        causal_mask="TopLeft" if _argument(node, 5, "is_causal", False) else None,
    )
    return emit(relax.op.permute_dims(emit(out), [0, 2, 1, 3]))


def _layer_norm(node: Any, importer: Any) -> relax.Var:
    """Convert aten.layer_norm; where it has no gain or shift, these are ones and zeros."""
    x, shape = importer.env[node.args[0]], [int(d) for d in node.args[1]]
    gain, shift = (_argument(node, i, name) for i, name in ((2, "weight"), (3, "bias")))
    gain = importer.env[gain] if gain is not None else relax.const(np.ones(shape, "float32"))
    shift = importer.env[shift] if shift is not None else relax.const(np.zeros(shape, "float32"))
    axes = list(range(-len(shape), 0))
    norm = relax.op.nn.layer_norm(x, gain, shift, axes=axes, epsilon=_argument(node, 4, "eps", 1e-5))
    return importer.block_builder.emit(norm)


def _repeat(node: Any, importer: Any) -> relax.Var:
    """Convert aten.repeat to a broadcast; the counts may be symbolic."""
    x, *counts = importer.retrieve_args(node)
    counts = counts[0] if isinstance(counts[0], tuple | list) else counts
    return tile(importer.block_builder.emit, x, counts)


CONVERTERS: dict[str, Converter] = {
    "scaled_dot_product_attention.default": _attention,
    "layer_norm.default": _layer_norm,
    "repeat.default": _repeat,
}
