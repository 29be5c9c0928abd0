"""Operators by their sizes, for whoever has no graph at hand: checks on a GPU, tests, measurements of single kernels.

What is not given is as it would be by default: rows in fp32 as wide as their columns, no bias but the one of products.
"""

from __future__ import annotations

from collections.abc import Sequence

from turbo_tvm.ops import formats
from turbo_tvm.ops.attention import Attention
from turbo_tvm.ops.embedding import Embedding
from turbo_tvm.ops.gate import Gate
from turbo_tvm.ops.linear import Linear
from turbo_tvm.ops.norm import L2Normalize, Norm, Softmax
from turbo_tvm.ops.operand import Operand
from turbo_tvm.ops.pool import Pool, PoolMode
from turbo_tvm.ops.rotary import Rotary
from turbo_tvm.ops.rows import CastRows, TileRows, UntileRows
from turbo_tvm.ops.weights import CastWeight, PackBias, PackDistances, PackWeight
from turbo_tvm.schedules.registry import Tiles

FP32 = formats.FP32.storage


def rows(tiles: Tiles, width: int, dtype: str = FP32) -> Operand:
    """Return rows of that width, (tiles, row_tile, width)."""
    return Operand.rows(width, dtype, tiles.row_tile)


def packed(tiles: Tiles, dtype: str) -> tuple[str, int]:
    """Return the dtype of weights for rows of this dtype, and how many numbers an element holds."""
    stored = formats.of_storage(dtype)
    if tiles.in_pairs and stored is not None and stored.word is not None:
        return stored.word, stored.per_word
    return dtype, 1


def vector(columns: int, dtype: str = FP32) -> Operand:
    """Return a number per column."""
    return Operand((columns,), dtype)


def linear(
    tiles: Tiles,
    k: int,
    n: int,
    *,
    activation: str | None = None,
    residual: Operand | bool = False,
    norm_eps: float | None = None,
    x: Operand | None = None,
    out: Operand | None = None,
) -> Linear:
    """Return a product of k by n. residual: how its rows are stored, True for fp32."""
    x, result = x or rows(tiles, k), out or rows(tiles, n)
    dtype, per_element = packed(tiles, x.dtype)
    panels = -(-n // tiles.col_tile)
    normed = norm_eps is not None
    return Linear(
        x=x,
        weight=Operand((panels, k // per_element, tiles.col_tile), dtype),
        bias=vector(panels * tiles.col_tile),
        residual=rows(tiles, n) if residual is True else residual or None,
        gamma=vector(n) if normed else None,
        beta=vector(n) if normed else None,
        activation=activation,
        norm_eps=norm_eps,
        columns=n if result.width != n else None,
        out=result,
    )


def qkv_columns(widths: Sequence[int], *, merged: bool = True, wider: int = 0) -> list[tuple[int, int]]:
    """Return (width of the row, first column) of Q, K and V.

    widths: their columns; merged: side by side in one buffer, else in three; wider: by how much rows are wider.
    """
    if not merged:
        return [(width + wider, 0) for width in widths]
    return [(sum(widths) + wider, sum(widths[:i])) for i in range(len(widths))]


def attention(
    tiles: Tiles,
    heads: int,
    head_dim: int,
    max_length: int,
    *,
    columns: Sequence[tuple[int, int]],
    scale: float | None = None,
    kv_heads: int | None = None,
    window: int | None = None,
    position_bias: bool = False,
    key_table: int = 0,
    query_table: int = 0,
    dtype: str = FP32,
    out: Operand | None = None,
) -> Attention:
    """Return an attention.

    columns: (width, first column) of q, k and v. key_table, query_table: columns of a packed one, 0 for none.
    """
    (q_width, q_first), (k_width, k_first), (v_width, v_first) = columns
    stored, per_element = packed(tiles, dtype)
    return Attention(
        q=rows(tiles, q_width, dtype),
        k=rows(tiles, k_width, dtype),
        v=rows(tiles, v_width, dtype),
        query_tiles=Operand((None, 3), formats.INDEX),
        position_bias=Operand((heads, 2 * max_length - 1), FP32) if position_bias else None,
        key_table=vector(heads * (head_dim // per_element) * key_table, stored) if key_table else None,
        query_table=vector(heads * (head_dim // per_element) * query_table, stored) if query_table else None,
        heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        max_length=max_length,
        first_columns=(q_first, k_first, v_first),
        kv_heads=kv_heads,
        window=window,
        out=out or rows(tiles, heads * head_dim),
    )


def norm(
    tiles: Tiles,
    columns: int,
    *,
    eps: float = 1e-12,
    residual: Operand | bool = False,
    rms: bool = False,
    vectors: str = FP32,
    x: Operand | None = None,
    out: Operand | None = None,
) -> Norm:
    """Return a layer norm, or an RMS norm. vectors: dtype of gamma and beta."""
    return Norm(
        x=x or rows(tiles, columns),
        residual=rows(tiles, columns) if residual is True else residual or None,
        gamma=vector(columns, vectors),
        beta=None if rms else vector(columns, vectors),
        eps=eps,
        out=out or rows(tiles, columns),
    )


def l2_normalize(
    tiles: Tiles, columns: int, *, eps: float = 1e-12, x: Operand | None = None, out: Operand | None = None
) -> L2Normalize:
    """Return a division of rows by their Euclidean length."""
    result = out or rows(tiles, columns)
    used = columns if result.width != columns else None
    return L2Normalize(x=x or rows(tiles, columns), eps=eps, columns=used, out=result)


def softmax(tiles: Tiles, columns: int, *, x: Operand | None = None, out: Operand | None = None) -> Softmax:
    """Return a softmax of rows."""
    result = out or rows(tiles, columns)
    used = columns if result.width != columns else None
    return Softmax(x=x or rows(tiles, columns), columns=used, out=result)


def gate(
    tiles: Tiles,
    columns: int,
    activation: str,
    *,
    second: bool = False,
    x: Operand | None = None,
    out: Operand | None = None,
) -> Gate:
    """Return a gated linear unit of halves of so many columns."""
    x, result = x or rows(tiles, 2 * columns), out or rows(tiles, columns)
    return Gate(x=x, activation=activation, columns=columns, second=second, out=result)


def rotary(
    tiles: Tiles,
    columns: int,
    spans: Sequence[tuple[int, int]],
    *,
    head_dim: int,
    dims: int,
    positions: int,
    x: Operand | None = None,
    out: Operand | None = None,
) -> Rotary:
    """Return a rotation of the first `dims` columns of the heads of spans."""
    return Rotary(
        x=x or rows(tiles, columns),
        position_ids=Operand((None, tiles.row_tile), formats.INDEX),
        table=Operand((positions, dims), FP32),
        columns=columns,
        head_dim=head_dim,
        spans=tuple((first, heads) for first, heads in spans),
        out=out or rows(tiles, columns),
    )


def embedding(
    tiles: Tiles,
    columns: int,
    tables: int,
    *,
    norm_eps: float | None = None,
    table_type: str = FP32,
    vectors: str = FP32,
    out: Operand | None = None,
) -> Embedding:
    """Return a sum of look-ups in so many tables."""
    return Embedding(
        ids=tuple(Operand((None, tiles.row_tile), formats.INDEX) for _ in range(tables)),
        tables=tuple(Operand((None, columns), table_type) for _ in range(tables)),
        gamma=None if norm_eps is None else vector(columns, vectors),
        beta=None if norm_eps is None else vector(columns, vectors),
        norm_eps=norm_eps,
        out=out or rows(tiles, columns),
    )


def pool(
    tiles: Tiles,
    columns: int,
    mode: PoolMode,
    *,
    row: int = 0,
    token: int | None = None,
    x: Operand | None = None,
) -> Pool:
    """Return a pooling of rows."""
    places = Operand((None,), formats.INDEX)
    return Pool(
        x=x or rows(tiles, columns),
        cu_seqlens=places if token is None else None,
        pooled_rows=None if token is None else places,
        mode=mode,
        row=row,
        token=token,
        out=rows(tiles, columns),
    )


def cast_rows(tiles: Tiles, columns: int, out: Operand) -> CastRows:
    """Return a change of the format of rows in fp32."""
    return CastRows(x=rows(tiles, columns), out=out)


def tile_rows(tiles: Tiles, columns: int) -> TileRows:
    """Return the copy of flat rows into tiles."""
    return TileRows(x=Operand((None, columns), FP32), out=rows(tiles, columns))


def untile_rows(tiles: Tiles, columns: int) -> UntileRows:
    """Return the copy of rows out of their tiles."""
    return UntileRows(x=rows(tiles, columns), out=Operand((None, columns), FP32))


def pack_weight(tiles: Tiles, k: int, n: int, dtype: str = FP32) -> PackWeight:
    """Return the packing of a weight (n, k) for rows of that dtype."""
    stored, per_element = packed(tiles, dtype)
    shape = (-(-n // tiles.col_tile), k // per_element, tiles.col_tile)
    return PackWeight(weight=Operand((n, k), FP32), out=Operand(shape, stored))


def pack_bias(tiles: Tiles, n: int) -> PackBias:
    """Return the packing of a bias."""
    return PackBias(bias=vector(n), out=vector(-(-n // tiles.col_tile) * tiles.col_tile))


def cast_weight(shape: tuple[int, ...], dtype: str) -> CastWeight:
    """Return a change of the format of a weight in fp32."""
    return CastWeight(weight=Operand(shape, FP32), out=Operand(shape, dtype))


def pack_distances(
    tiles: Tiles, heads: int, head_dim: int, columns: int, row_width: int, dtype: str = FP32
) -> PackDistances:
    """Return the packing of a table over distances that rows of that dtype are multiplied with."""
    stored, per_element = packed(tiles, dtype)
    out = vector(heads * (head_dim // per_element) * row_width, stored)
    return PackDistances(table=Operand((heads, head_dim, columns), FP32), row_width=row_width, out=out)
