"""Embedding on a GPU: the sum of rows of up to three tables, with or without layer norm, in one kernel.

Layout: ids int32 `(m, 1)` each, m symbolic; tables `(rows, hidden)`, fp32, fp16 or bf16 all alike; out `(m, 1, hidden)`
or wider. Ids are not checked: whoever makes them keeps them inside the tables.

Strategy
1. A team of threads (`reduction.py`) gathers the rows of a token and adds them up in fp32 registers.
2. It normalises the sum there (`normalize_rows.py`), or leaves it as it is, and stores it once.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Embedding
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro, Space, Variant
from turbo_tvm.schedules.cpu.embedding import MAX_TABLES
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.cuda import reduction, strips
from turbo_tvm.schedules.cuda.normalize_rows import normalize_macro
from turbo_tvm.schedules.cuda.reduction import RowForm
from turbo_tvm.schedules.cuda.script import kernel_attrs
from turbo_tvm.schedules.cuda.strips import Element, Team
from turbo_tvm.schedules.cuda.tiles import CudaTiles

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

Buffers = tuple[tvm.tirx.Buffer, ...]


def space(operator: Embedding, _tiles: CudaTiles) -> Space:
    """Return the decisions of this kernel: how rows are spread over threads."""
    return reduction.row_space(operator.columns_out, _vector(operator))


def _vector(operator: Embedding) -> int:
    """Return the elements per access that suit the tables and the output."""
    hidden = operator.columns_out
    return reduction.vector_width(hidden, operator.out, Operand.rows(hidden, operator.tables[0].dtype))


def embedding(
    operator: Embedding, _tiles: CudaTiles, variants: Sequence[Variant] = (), form: RowForm | None = None
) -> tvm.tirx.PrimFunc:
    """Return the kernel `(ids..., tables..., [gamma, beta,] out)`: out = norm(sum of tables[i][ids[i]]).

    form, variants: as for `normalization.norm`.
    """
    tables, norm_eps = len(operator.tables), operator.norm_eps
    if not 1 <= tables <= MAX_TABLES:
        raise ValueError(f"{tables} tables: 1 to {MAX_TABLES} are supported")
    hidden, table_type, out_rows = operator.columns_out, operator.tables[0].dtype, operator.out
    vectors = operator.gamma.dtype if operator.gamma is not None else "float32"
    form = form or reduction.chosen_form(hidden, _vector(operator), variants)
    gather = _gather_macro(form, tables, table_type)
    if norm_eps is None:
        finish = _store_sum_macro(form, out_rows.dtype)
    else:
        finish = normalize_macro(form, eps=norm_eps, kind="layer", out=out_rows, vectors=vectors)

    def summed(ids: Buffers, held: Buffers, team: Team) -> Macro:
        """Return `load(strip, segment)`: fill the strip with the sum of a token's rows."""

        @T.inline
        def load(strip, segment):
            gather(strip, ids, held, team, segment)

        return load

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
        T.func_attr(kernel_attrs(form.rows * form.teams))
        m = T.int32()
        rows_0 = T.int32()
        rows_1 = T.int32()
        rows_2 = T.int32()
        ids_0 = T.match_buffer(ids_0_arg, (m, 1), "int32")
        ids_1 = T.match_buffer(ids_1_arg, (m, 1), "int32")
        ids_2 = T.match_buffer(ids_2_arg, (m, 1), "int32")
        table_0 = T.match_buffer(table_0_arg, (rows_0, hidden), table_type)
        table_1 = T.match_buffer(table_1_arg, (rows_1, hidden), table_type)
        table_2 = T.match_buffer(table_2_arg, (rows_2, hidden), table_type)
        gamma = T.match_buffer(gamma_arg, (hidden,), vectors)
        beta = T.match_buffer(beta_arg, (hidden,), vectors)
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        for block in T.thread_binding(form.blocks(m), thread="blockIdx.x"):
            for y in T.thread_binding(form.teams, thread="threadIdx.y"):
                for thread in T.thread_binding(form.threads, thread="threadIdx.x"):
                    team = T.meta_var(Team(form, thread, form.first_row(block, y), m))
                    ids = T.meta_var((ids_0, ids_1, ids_2))
                    held = T.meta_var((table_0, table_1, table_2))
                    # 2. normalised, and stored
                    finish(summed(ids, held, team), team, gamma, beta, result)

    unused = [f"{name}_{i}" for name in ("ids", "table") for i in range(tables, MAX_TABLES)]
    return without_parameters(kernel, unused + ([] if norm_eps is not None else ["gamma", "beta"]))


def _gather_macro(form: RowForm, tables: int, table_type: str) -> Macro:
    """Return `gather(strip, ids, held, team, segment)`: fill the strip with the sum of rows of so many tables."""
    first, add = (strips.gather_rows_macro(form, table_type, added=added) for added in (False, True))

    @T.inline
    def gather(strip, ids, held, team, segment):
        # 1. the sum of a token's rows
        first(strip, held[0], ids[0], team, segment)
        if tables > 1:
            add(strip, held[1], ids[1], team, segment)
        if tables > 2:
            add(strip, held[2], ids[2], team, segment)

    return gather


def _store_sum_macro(form: RowForm, dtype: str) -> Macro:
    """Return `store_sum(load, team, gamma, beta, result)`: store what load(strip, segment) makes; no norm, no gains."""
    each_chunk, store_chunk = strips.each_chunk_macro(form), strips.store_chunk_macro(form, dtype)

    def of_chunk(strip: tvm.tirx.Buffer, chunk: Expr) -> Element:
        return lambda row, j: strip[row, chunk * form.vector + j]

    @T.inline
    def store_sum(load, team, gamma, beta, result):
        with T.sblock("sum"):
            T.reads()
            T.writes()
            strip = T.sblock_alloc_buffer((form.rows, form.strip), "float32", scope="local")
            for segment in range(form.segments):
                load(strip, segment)

                @T.inline
                def store(chunk, column):
                    store_chunk(result, team, column, of_chunk(strip, chunk))

                each_chunk(team, segment, store)

    return store_sum
