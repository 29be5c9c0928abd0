"""Row normalisation on a GPU by the batch reduction (`reduction.py`): layer norm, RMS norm and L2 norm.

Layout: activations `(m, 1, width)`, the first n columns of them, fp32, fp16 or bf16; m symbolic. `bias`, `gamma`,
`beta`: `(n,)` in any of these formats. fp32 arithmetic.

One kernel adds the residual and the bias, normalises and rounds to the format of the next kernel: each input is read
once, the result written once. The sum stays in registers, in fp32. Variance is the corrected two-pass algorithm: the
mean; then, reduced together, the sums of x - mean, which repairs the rounding of the mean, and of its squares.
E[x^2] - E[x]^2 in one pass was rejected: with |mean| >> std it cancels to noise.

Method: the batch reduction of TurboTransformers (PPoPP 2021); Chan, Golub, LeVeque (1983), equation 1.7; Zhang,
Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda import reduction, strips
from turbo_tvm.schedules.cuda.numbers import to_float
from turbo_tvm.schedules.cuda.reduction import RowForm, add
from turbo_tvm.schedules.cuda.script import kernel_attrs
from turbo_tvm.schedules.cuda.strips import Team
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.common.space import Space, Variant

REGISTERS = 72  # for the elements of two rows, which share the reads of bias, gamma and beta

KINDS = ("layer", "rms", "l2")

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it

Macro = Callable[..., None]


def space(
    *,
    n: int,
    residual: bool = False,
    x: RowFormat | None = None,
    extra: RowFormat | None = None,
    out: RowFormat | None = None,
    **_options: object,
) -> Space:
    """The decisions of this kernel: how rows are spread over threads."""
    return reduction.row_space(n, _vector(n, residual, x, extra, out), registers=REGISTERS)


def _vector(n: int, residual: bool, x: RowFormat | None, extra: RowFormat | None, out: RowFormat | None) -> int:
    """Elements per access that suit all rows that are read or written."""
    formats = (x, out, *((extra,) if residual else ()))
    return reduction.vector_width(n, *(rows or RowFormat(n) for rows in formats))


def normalize_macro(form: RowForm, *, eps: float, kind: str, out: RowFormat, vectors: str) -> Macro:
    """`normalize(load, team, gamma, beta, result)`: the norm of a team's rows, of form.n columns.

    load(strip, segment) is a macro that fills the thread's strip, with zeros past the end of the row. It is called once
    if rows fit registers. gamma and beta are not looked at by kinds that have none.
    """
    n, rows, segments, centred = form.n, form.rows, form.segments, kind == "layer"
    load_columns, each_chunk = strips.load_columns_macro(form, vectors), strips.each_chunk_macro(form)
    store_chunk = strips.store_chunk_macro(form, out.dtype)
    reduce_mean = reduction.all_reduce_macro(form, add, rows)
    reduce_sums = reduction.all_reduce_macro(form, add, 2 * rows)
    strip_sum, strip_squares = strips.strip_reduce_macro(form, add), strips.strip_reduce_macro(form, add, rows)
    strip_map = strips.strip_map_macro(form)

    def plain(strip: tvm.tirx.Buffer):
        return lambda row, i: strip[row, i]

    def squares(strip: tvm.tirx.Buffer):
        return lambda row, i: strip[row, i] * strip[row, i]

    def less(strip: tvm.tirx.Buffer, mean: tvm.tirx.Buffer):
        return lambda row, i: strip[row, i] - mean[row]

    def factor(square_sum: Expr, drift: Expr) -> Expr:
        if kind == "l2":
            return T.float32(1) / T.max(T.sqrt(square_sum), T.float32(eps))
        variance = T.max(square_sum / T.float32(n) - drift * drift, T.float32(0))
        return T.float32(1) / T.sqrt(variance + T.float32(eps))

    def scaled(strip, sums, gains, shifts, chunk):
        """The result; sums holds the drift of the mean and, behind it, the factor."""

        def element(row: Expr, j: Expr) -> Expr:
            value = strip[row, chunk * form.vector + j]
            if kind == "l2":
                return value * sums[rows + row]
            if kind == "rms":
                return value * sums[rows + row] * to_float(gains[j], vectors)
            value = (value - sums[row]) * sums[rows + row]
            return value * to_float(gains[j], vectors) + to_float(shifts[j], vectors)

        return element

    @T.inline
    def centre(load, team, strip, mean, partials):
        for row in T.unroll(rows):
            mean[row] = T.float32(0)
        for segment in range(segments):
            load(strip, segment)
            strip_sum(mean, plain(strip))
        reduce_mean(mean, partials, 0, team.thread)
        for row in T.unroll(rows):
            mean[row] = mean[row] / T.float32(n)

    @T.inline
    def normalize(load, team, gamma, beta, result):
        with T.sblock("normalize"):
            T.reads()
            T.writes()
            strip = T.sblock_alloc_buffer((rows, form.strip), "float32", scope="local")
            mean = T.sblock_alloc_buffer((rows,), "float32", scope="local")
            sums = T.sblock_alloc_buffer((2 * rows,), "float32", scope="local")
            gains = T.sblock_alloc_buffer((form.vector,), vectors, scope="local")
            shifts = T.sblock_alloc_buffer((form.vector,), vectors, scope="local")
            partial_means = T.sblock_alloc_buffer((1, rows, form.warps), "float32", scope="shared")
            partial_sums = T.sblock_alloc_buffer((1, 2 * rows, form.warps), "float32", scope="shared")
            if centred:
                centre(load, team, strip, mean, partial_means)
            for i in T.unroll(2 * rows):
                sums[i] = T.float32(0)
            for segment in range(segments):
                if segments > 1 or not centred:
                    load(strip, segment)
                if centred:
                    strip_map(strip, team, segment, less(strip, mean))
                    strip_sum(sums, plain(strip))
                strip_squares(sums, squares(strip))
            reduce_sums(sums, partial_sums, 0, team.thread)
            for row in T.unroll(rows):
                sums[row] = sums[row] / T.float32(n)
                sums[rows + row] = factor(sums[rows + row], sums[row])
            for segment in range(segments):
                if segments > 1:
                    load(strip, segment)
                    if centred:
                        strip_map(strip, team, segment, less(strip, mean))

                @T.inline
                def store(chunk, column):
                    if kind != "l2":
                        load_columns(gains, gamma, column)
                    if centred:
                        load_columns(shifts, beta, column)
                    store_chunk(result, team, column, scaled(strip, sums, gains, shifts, chunk))

                each_chunk(team, segment, store)

    return normalize


def norm(
    *,
    n: int,
    eps: float,
    kind: str = "layer",
    residual: bool = False,
    bias: bool = False,
    x: RowFormat | None = None,
    extra: RowFormat | None = None,
    out: RowFormat | None = None,
    vectors: str = "float32",
    form: RowForm | None = None,
    variants: Sequence[Variant] = (),
) -> tvm.tirx.PrimFunc:
    """`(x, [residual,] [bias,] [gamma,] [beta,] out)`: the rows v = x [+ residual] [+ bias], normalised.

    kind: "layer", (v - mean v) / sqrt(var v + eps) * gamma + beta; "rms", v / sqrt(mean v^2 + eps) * gamma; or "l2",
    v / max(|v|, eps), which takes neither. x, extra, out: how x, the residual and out are stored, by default fp32 and n
    columns wide. vectors: the dtype of bias, gamma and beta. variants: one setting of `space` at most. form: how rows
    are spread over threads, in the place of variants.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown norm {kind!r}: use one of {', '.join(KINDS)}")
    x_rows, extra_rows, out_rows = x or RowFormat(n), extra or RowFormat(n), out or RowFormat(n)
    form = form or reduction.chosen_form(n, _vector(n, residual, x, extra, out), variants, registers=REGISTERS)
    load_x = strips.load_rows_macro(form, x_rows.dtype)
    load_extra = strips.load_rows_macro(form, extra_rows.dtype, added=True)
    add_vector = strips.add_vector_macro(form, vectors)
    normalize = normalize_macro(form, eps=eps, kind=kind, out=out_rows, vectors=vectors)

    @T.inline
    def run(x, extra, vector, gamma, beta, result, team):
        @T.inline
        def load(strip, segment):
            load_x(strip, x, team, segment)
            if residual:
                load_extra(strip, extra, team, segment)
            if bias:
                add_vector(strip, vector, team, segment)

        normalize(load, team, gamma, beta, result)

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        residual_arg: T.handle,
        bias_arg: T.handle,
        gamma_arg: T.handle,
        beta_arg: T.handle,
        out_arg: T.handle,
    ):
        T.func_attr(kernel_attrs(form.rows * form.teams))
        m = T.int32()
        source = T.match_buffer(x_arg, (m, 1, x_rows.width), x_rows.dtype)
        residual_rows = T.match_buffer(residual_arg, (m, 1, extra_rows.width), extra_rows.dtype)
        vector = T.match_buffer(bias_arg, (n,), vectors)
        gamma = T.match_buffer(gamma_arg, (n,), vectors)
        beta = T.match_buffer(beta_arg, (n,), vectors)
        result = T.match_buffer(out_arg, (m, 1, out_rows.width), out_rows.dtype)
        for block in T.thread_binding(form.blocks(m), thread="blockIdx.x"):
            for y in T.thread_binding(form.teams, thread="threadIdx.y"):
                for thread in T.thread_binding(form.threads, thread="threadIdx.x"):
                    team = T.meta_var(Team(form, thread, form.first_row(block, y), m))
                    run(source, residual_rows, vector, gamma, beta, result, team)

    absent = [*([] if residual else ["residual_rows"]), *([] if bias else ["vector"])]
    absent += {"layer": [], "rms": ["beta"], "l2": ["gamma", "beta"]}[kind]
    return without_parameters(kernel, absent)
