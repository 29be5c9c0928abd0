"""Operators that differ in one parameter each: for what holds of every operator of the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import sized_operators as sized
from tvm import relax, tirx

from turbo_tvm.ops import Operator
from turbo_tvm.ops.attention import Attention
from turbo_tvm.ops.formats import BF16
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cpu.tiles import CpuTiles

TILES = CpuTiles(lanes=16, row_tile=4, tile_units=3, col_tile=16)  # as wide as bf16 needs
DISTANCES = 80  # columns of a table over distances: of 24 tokens 47, and the lanes past the last query
SHORT = BF16.storage


def merged(inner: int, width: int | None = None) -> Sequence[tuple[int, int]]:
    """Return (width, first column) of q, k and v that lie side by side in the same rows."""
    return tuple((width or 3 * inner, i * inner) for i in range(3))


def attention(heads: int = 2, head_dim: int = 8, max_length: int = 24, **more: Any) -> Attention:
    """Return an attention whose operands lie side by side."""
    return sized.attention(TILES, heads, head_dim, max_length, **{"columns": merged(heads * head_dim), **more})


rows = partial(sized.rows, TILES)
short = partial(sized.rows, TILES, dtype=SHORT)
linear = partial(sized.linear, TILES)
norm = partial(sized.norm, TILES, eps=1e-5)
normalize = partial(sized.l2_normalize, TILES, 16)
softmax = partial(sized.softmax, TILES)
embedding = partial(sized.embedding, TILES)
pool = partial(sized.pool, TILES, 16)
gate = partial(sized.gate, TILES, 16)
rotary = partial(sized.rotary, TILES, head_dim=8)
pack_distances = partial(sized.pack_distances, TILES, columns=47, row_width=DISTANCES)

VARIANTS: tuple[Operator, ...] = (
    linear(16, 8),
    linear(32, 8),
    linear(16, 16),
    linear(16, 8, activation="gelu"),
    linear(16, 8, activation="gelu_tanh"),
    linear(16, 8, activation="relu"),
    linear(16, 8, residual=True),
    linear(16, 8, norm_eps=1e-12),
    linear(16, 8, norm_eps=1e-5),
    linear(16, 8, residual=True, norm_eps=1e-5),
    linear(16, 8, x=rows(32)),
    linear(16, 8, out=rows(24)),
    attention(),
    attention(position_bias=True),
    attention(scale=1.0),
    attention(max_length=48),
    attention(heads=4, head_dim=4),
    attention(columns=((16, 0),) * 3),
    attention(window=5),
    attention(kv_heads=1, columns=((16, 0), (8, 0), (8, 0))),
    attention(key_table=DISTANCES),
    attention(query_table=DISTANCES, position_bias=True),
    attention(key_table=DISTANCES, query_table=DISTANCES, window=5),
    norm(16),
    norm(16, residual=True),
    norm(16, eps=1e-12),
    norm(32),
    norm(16, rms=True),
    norm(16, x=rows(24)),
    norm(16, residual=rows(24)),
    norm(16, out=rows(24)),
    norm(16, out=short(16)),
    norm(16, x=short(16)),
    norm(16, x=short(16), out=short(16)),
    normalize(),
    normalize(x=short(16), out=short(16)),
    normalize(x=short(16)),
    softmax(16),
    softmax(16, x=rows(24)),
    softmax(16, x=short(16), out=short(16)),
    embedding(16, 1),
    embedding(16, 3),
    embedding(16, 3, norm_eps=1e-5),
    embedding(16, 3, norm_eps=1e-5, out=rows(24)),
    embedding(16, 3, table_type=SHORT),
    embedding(16, 3, table_type=SHORT, out=short(16)),
    pool("first"),
    pool("first", row=2),
    pool("mean"),
    pool("mean", x=rows(24)),
    pool("mean", x=short(16)),
    gate("gelu"),
    gate("silu"),
    gate("gelu", second=True),
    gate("gelu", x=rows(48)),
    gate("gelu", x=short(32), out=short(16)),
    rotary(48, ((0, 4),), dims=8, positions=24),
    rotary(48, ((0, 2),), dims=8, positions=24),
    rotary(48, ((16, 2),), dims=8, positions=24),
    rotary(48, ((0, 2), (32, 2)), dims=8, positions=24),
    rotary(48, ((0, 4),), dims=4, positions=24),
    rotary(48, ((0, 4),), dims=8, positions=48),
    rotary(48, ((0, 4),), dims=8, positions=24, x=rows(64)),
    rotary(48, ((0, 4),), dims=8, positions=24, x=short(48), out=short(48)),
    linear(16, 8, x=short(16)),
    linear(16, 8, x=short(16), out=short(8)),
    linear(16, 8, out=short(8)),
    linear(16, 8, x=short(16), residual=True),
    linear(16, 8, x=short(16), residual=short(8)),
    linear(16, 8, x=short(16), residual=short(24)),
    linear(16, 8, x=short(32), out=short(24)),
    attention(dtype=SHORT),
    attention(dtype=SHORT, out=short(16)),
    attention(columns=merged(16, 80)),
    attention(columns=((48, 0), (48, 16), (16, 0))),
    attention(out=rows(48)),
    sized.cast_rows(TILES, 16, short(16)),
    sized.cast_weight((9, 16), SHORT),
    sized.cast_weight((9, 8), SHORT),
    sized.pack_weight(TILES, 16, 8, SHORT),
    sized.pack_weight(TILES, 16, 8),
    sized.pack_weight(TILES, 8, 16),
    sized.pack_bias(TILES, 8),
    pack_distances(2, 8),
    pack_distances(1, 16),
    pack_distances(2, 8, dtype=SHORT),
    sized.tile_rows(TILES, 16),
    sized.untile_rows(TILES, 16),
)


def in_graph(operator: Operator, tokens: tirx.Var | None = None) -> Any:
    """Return the operator with Relax expressions in place of operands, as passes make it.

    tokens: the first dimension of rows; other dimensions that the batch decides are symbols of their own.
    """
    tiles = tokens if tokens is not None else tirx.Var("tiles", "int64")
    tensors = operator.with_tensors(lambda operand: relax.Var("tensor", _type(operand, tiles)))
    return dataclasses.replace(tensors, out=_type(operator.out, tiles))


def _type(operand: Operand, tiles: tirx.Var) -> relax.TensorType:
    first = tiles if operand.shape[1:2] == (TILES.row_tile,) else tirx.Var("n", "int64")
    return relax.TensorType([first if d is None else d for d in operand.shape], operand.dtype)
