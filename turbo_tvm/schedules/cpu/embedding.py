"""Token embedding on the CPU: the sum of one row from each table, then layer norm. fp32 arithmetic, ids int32.

Layout: ids `(t, R)`, tables `(rows_i, hidden)`, out `(t, R, hidden)`, R = `tiles.row_tile`, t symbolic. The ids of
surplus rows are looked up like any other, so they must be valid too (0 will do). Any hidden.

Strategy
1. One parallel task per row tile: the scratch of the layer norm is allocated once for R rows.
2. A row's sum is stored to `out` in whole vectors and a scalar rest; the layer norm then works in place on that row,
   which is still in L1. Handing it the sum as an expression was rejected: it would read every table three times.

Method: token-packed embedding without position arithmetic; the caller derives position ids from cu_seqlens.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Embedding
from turbo_tvm.schedules.common.space import Macro, Space, Variant, by_rows
from turbo_tvm.schedules.cpu import bf16, normalization
from turbo_tvm.schedules.cpu.normalization_rows import normalize_row_macro, row_of
from turbo_tvm.schedules.cpu.script import CPU_LLVM, without_parameters
from turbo_tvm.schedules.cpu.tiles import CpuTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

MAX_TABLES = 3


def space(operator: Embedding, tiles: CpuTiles) -> Space:
    """Return the decision of this kernel: that of its layer norm, if there is one."""
    return Space() if operator.norm_eps is None else normalization.space(operator, tiles)


def _sum_of_rows(
    ids: Sequence[tvm.tirx.Buffer], tables: Sequence[tvm.tirx.Buffer], tile: Expr, row: Expr, column: Expr
) -> Expr:
    """Return an element of the sum of one row from each table."""
    first, *others = [
        bf16.load(table, T.cast(i[tile, row], "int64"), column) for i, table in zip(ids, tables, strict=True)
    ]
    for other in others:
        first = first + other
    return first


def embedding(operator: Embedding, tiles: CpuTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return `(ids_0, ..., table_0, ..., [gamma, beta,] out)`: out = [layer_norm](sum of table_i[ids_i]).

    ids_i: int32 `(t, R)`, in 0 .. rows_i - 1: the caller checks. table_i: `(rows_i, columns)`, fp32 or bf16; rows_i
    symbolic. gamma, beta: fp32 `(columns,)`, present when there is a `norm_eps`. variants: settings of `space` by rows.
    """
    tables = len(operator.tables)
    if not 1 <= tables <= MAX_TABLES:
        raise ValueError(f"tables = {tables}: an embedding sums 1 to {MAX_TABLES} tables")
    hidden, norm_eps = operator.columns_out, operator.norm_eps
    rows, out_rows, used = tiles.row_tile, operator.out, slice(0, tables)
    table_type, choices = operator.tables[0].dtype, space(operator, tiles)
    embed = by_rows(variants, choices, rows, lambda setting: _embed_macro(tiles, hidden, norm_eps, setting))

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        ids_0_arg: T.handle,
        ids_1_arg: T.handle,
        ids_2_arg: T.handle,
        table_0_arg: T.handle,
        table_1_arg: T.handle,
        table_2_arg: T.handle,
        gamma_arg: T.handle,
        beta_arg: T.handle,
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        rows_0 = T.int64()
        rows_1 = T.int64()
        rows_2 = T.int64()
        ids_0 = T.match_buffer(ids_0_arg, (t, rows), "int32")
        ids_1 = T.match_buffer(ids_1_arg, (t, rows), "int32")
        ids_2 = T.match_buffer(ids_2_arg, (t, rows), "int32")
        table_0 = T.match_buffer(table_0_arg, (rows_0, hidden), table_type)
        table_1 = T.match_buffer(table_1_arg, (rows_1, hidden), table_type)
        table_2 = T.match_buffer(table_2_arg, (rows_2, hidden), table_type)
        gamma = T.match_buffer(gamma_arg, (hidden,), "float32")
        beta = T.match_buffer(beta_arg, (hidden,), "float32")
        result = T.match_buffer(out_arg, (t, rows, out_rows.width), out_rows.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", CPU_LLVM):
            all_ids = T.meta_var((ids_0, ids_1, ids_2)[used])
            all_tables = T.meta_var((table_0, table_1, table_2)[used])
            operands = T.meta_var((all_ids, all_tables, gamma, beta, result))
            embed(t, operands)

    unused = [f"{name}_{i}" for name in ("ids", "table") for i in range(tables, MAX_TABLES)]
    return without_parameters(kernel, unused + ([] if norm_eps is not None else ["gamma", "beta"]))


def _embed_macro(tiles: CpuTiles, hidden: int, norm_eps: float | None, setting: dict[str, int]) -> Macro:
    """`embed(t, operands)`: the whole strategy; operands: (ids, tables, gamma, beta, out)."""
    rows, lanes = tiles.row_tile, tiles.lanes
    whole = hidden // lanes * lanes
    normalize = normalize_row_macro(lanes, hidden, norm_eps or 0.0, **setting)

    @T.inline
    def gather(ids, table, tile, row, out):
        for block in range(hidden // lanes):
            for lane in T.vectorized(lanes):
                out[tile, row, block * lanes + lane] = bf16.stored(
                    out, _sum_of_rows(ids, table, tile, row, block * lanes + lane)
                )
        for rest in range(hidden - whole):
            out[tile, row, whole + rest] = bf16.stored(out, _sum_of_rows(ids, table, tile, row, whole + rest))

    @T.inline
    def embed_tiles(t, ids, tables, gamma, beta, out):
        # 1. a task per row tile
        for tile in T.parallel(t):
            for row in range(rows):
                # 2. the sum, then the norm in place, on a row that is still in L1
                gather(ids, tables, tile, row, out)
                if norm_eps is not None:
                    normalize(out, tile, row, row_of(tile, row, out), gamma, beta)

    @T.inline
    def embed(t, operands):
        embed_tiles(t, *operands)

    return embed
