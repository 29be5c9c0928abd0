"""Composites: the fused operators that the passes build and the pipeline lowers to kernels.

A composite is a Relax call `R.call_dps_packed("turbo.<name>", (tensors..., R.str(json attributes)), out_ty)`. Relax
functions with a `Composite` attribute, TVM's other idiom, need a body in Relax operators, and ragged attention has
none: its sequence bounds are data. A call prints, parses and compares structurally like any other expression.

Vocabulary (T = packed rows `(tiles, row_tile, columns)`; before padding is removed, `(batch, length, columns)`):

    attention(q, k, v, bounds..., [position_bias], [key_table], [query_table])   heads, head_dim, scale, max_length,
                                                     columns [[width, offset] x 3]; kv_heads: of k and v, if fewer;
                                                     window: keys at most so far away; key_distances, query_distances:
                                                     whether there are these tables
    pool(x, bounds)                                  mode "first" | "mean"; of "first" [row], which one, or [token],
                                                     the first of that id, -1 for that of the largest id
    linear(x, weight, bias, [residual], [gamma, beta])   activation, residual, norm_eps
    norm(x, [residual], gamma, [beta])               eps, residual, kind "rms" (then without beta)
    gate(x)                                          activation, columns, second: activation(one half) * other half
    rotary(x, position_ids, table)                   columns, head_dim, spans [[first column, heads], ...]
    normalize(x)                                     eps: rows divided by their Euclidean length
    embedding(ids..., tables..., [gamma, beta])      tables, norm_eps
    pack_distances(table)                            from (heads, head_dim, 2L - 1), over i - j, to the kernel's layout
    pack_weight(w), pack_bias(b)                     the kernels' weight layout; pairs: in bf16
    cast_rows(x), cast_weight(w)                     in 16 bits; shape: of a weight
    tile_rows(x), untile_rows(x)                     (rows, columns) to T and back, for graphs that stay padded

Rows may be wider than their columns (`widen_rows`); a product then has the attribute `columns`, their true number.

`bounds` is the attention mask while the graph is padded, afterwards `query_tiles` (attention), `cu_seqlens` (pool) or
`pooled_rows` (pool of a token).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax

PREFIX = "turbo."
_CALL_DPS_PACKED = ir.Op.get("relax.call_dps_packed")


@dataclass(frozen=True)
class Composite:
    """One fused operator: its name without the prefix, its tensor arguments and its attributes."""

    name: str
    tensors: tuple[relax.Expr, ...]
    attrs: dict[str, Any] = field(default_factory=dict)

    def call(self, out_ty: relax.Type) -> relax.Call:
        """The composite as a Relax call that yields `out_ty`."""
        attributes = ir.StringImm(json.dumps(self.attrs, sort_keys=True))
        return relax.op.call_dps_packed(PREFIX + self.name, [*self.tensors, attributes], out_ty=out_ty)


def make(name: str, tensors: Sequence[relax.Expr], out_ty: relax.Type, **attrs: Any) -> relax.Call:
    """Build a composite's call."""
    return Composite(name, tuple(tensors), attrs).call(out_ty)


def match(expr: relax.Expr | None, name: str | None = None) -> Composite | None:
    """The composite that `expr` is, or None if it is anything else (or has another name)."""
    if not isinstance(expr, relax.Call) or not expr.op.same_as(_CALL_DPS_PACKED):
        return None
    symbol = str(expr.args[0].global_symbol)
    if not symbol.startswith(PREFIX) or (name is not None and symbol != PREFIX + name):
        return None
    *tensors, attributes = expr.args[1].fields
    return Composite(symbol[len(PREFIX) :], tuple(tensors), json.loads(attributes.value))


def distance_tables(attention: Composite) -> int:
    """How many tables over distances an attention has that tokens are multiplied with; they are its last tensors."""
    return sum(bool(attention.attrs.get(key)) for key in ("key_distances", "query_distances"))


def joined_spans(spans: Sequence[Sequence[int]], head_dim: int) -> list[list[int]]:
    """Spans of heads, [first column, heads] each, where one that follows another directly is part of it."""
    joined: list[list[int]] = []
    for first, heads in sorted(list(span) for span in spans):
        if joined and joined[-1][0] + joined[-1][1] * head_dim == first:
            joined[-1][1] += heads
        else:
            joined.append([first, heads])
    return joined


def read_by_operators(func: relax.Function) -> set[relax.Var]:
    """Variables that something else than a composite reads, or that the function returns: their type is fixed.

    Rows that leave their tiles do so for an operator, so `untile_rows` counts as one.
    """
    fixed: set[relax.Var] = set(relax.analysis.free_vars(func.body.body))
    for block in func.body.blocks:
        for binding in block.bindings:
            fused = match(binding.value)
            if fused is None or fused.name == "untile_rows":
                fixed.update(relax.analysis.free_vars(binding.value))
    return fixed
