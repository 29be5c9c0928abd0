"""Embedding on a GPU: the sum of rows of up to three tables, with or without layer norm, in one kernel.

Layout: ids int32 `(m, 1)` each, m symbolic; tables `(rows, hidden)`, fp32, fp16 or bf16 all alike; out `(m, 1, hidden)`
or wider. A team of threads (`reduction.py`) gathers the rows of a token, adds them up in fp32 registers, normalises the
sum there and stores it once. Ids are not checked: whoever makes them keeps them inside the tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda import reduction, strips
from turbo_tvm.schedules.cuda.normalization import normalize_macro
from turbo_tvm.schedules.cuda.reduction import RowForm
from turbo_tvm.schedules.cuda.script import kernel_attrs
from turbo_tvm.schedules.cuda.strips import Team
from turbo_tvm.schedules.cpu.embedding import MAX_TABLES
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.common.space import Space, Variant

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(*, hidden: int, table_type: str = "float32", out: RowFormat | None = None, **_options: object) -> Space:
    """The decisions of this kernel: how rows are spread over threads."""
    return reduction.row_space(hidden, _vector(hidden, table_type, out))


def _vector(hidden: int, table_type: str, out: RowFormat | None) -> int:
    """Elements per access that suit the tables and the output."""
    return reduction.vector_width(hidden, out or RowFormat(hidden), RowFormat(hidden, table_type))


def embedding(
    *,
    hidden: int,
    tables: int,
    norm_eps: float | None = None,
    table_type: str = "float32",
    vectors: str = "float32",
    out: RowFormat | None = None,
    form: RowForm | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(ids..., tables..., [gamma, beta,] out)`: out = norm(sum of tables[i][ids[i]]).

    norm_eps: None leaves the norm out. table_type, vectors: the dtypes of the tables, and of gamma and beta. out: fp32
    and hidden columns wide unless the format says else. form, variants: as for `normalization.norm`.
    """
    if not 1 <= tables <= MAX_TABLES:
        raise ValueError(f"{tables} tables: 1 to {MAX_TABLES} are supported")
    out_rows = out or RowFormat(hidden)
    form = form or reduction.chosen_form(hidden, _vector(hidden, table_type, out), variants)
    gather, add = (strips.gather_rows_macro(form, table_type, added=added) for added in (False, True))
    normalize = normalize_macro(form, eps=norm_eps or 0.0, kind="layer", out=out_rows, vectors=vectors)
    each_chunk, store_chunk = strips.each_chunk_macro(form), strips.store_chunk_macro(form, out_rows.dtype)

    def of_chunk(strip, chunk):
        return lambda row, j: strip[row, chunk * form.vector + j]

    @T.inline
    def run(ids, tables_held, gamma, beta, result, team):
        @T.inline
        def load(strip, segment):
            gather(strip, tables_held[0], ids[0], team, segment)
            if tables > 1:
                add(strip, tables_held[1], ids[1], team, segment)
            if tables > 2:
                add(strip, tables_held[2], ids[2], team, segment)

        if norm_eps is not None:
            normalize(load, team, gamma, beta, result)
        else:
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
                    run((ids_0, ids_1, ids_2), (table_0, table_1, table_2), gamma, beta, result, team)

    unused = [f"{name}_{i}" for name in ("ids", "table") for i in range(tables, MAX_TABLES)]
    return without_parameters(kernel, unused + ([] if norm_eps is not None else ["gamma", "beta"]))
