"""Row normalisation on a GPU by the batch reduction (`reduction.py`): layer norm, RMS norm and L2 norm.

Layout: activations `(m, 1, width)`, the first n columns of them, fp32, fp16 or bf16; m symbolic. `bias`, `gamma`,
`beta`: `(n,)` in any of these formats. fp32 arithmetic.

One kernel adds the residual and the bias, normalises and rounds to the format of the next kernel: each input is read
once, the result written once.

Strategy
1. The sum of the inputs stays in registers, in fp32; a row too long for them is read again for every sweep.
2. Layer norm: the mean of the row, one reduction; the strip becomes x - mean.
3. One more reduction, of the sums of squares, and with them, for layer norm, of the sums of x - mean: their drift from
   zero repairs the rounding of the mean (the corrected two-pass algorithm).
4. The strip times the factor that follows, gamma and beta, is rounded and stored.

Rejected: E[x^2] - E[x]^2 in one pass. With |mean| >> std it cancels to noise.

Method: the batch reduction of TurboTransformers (PPoPP 2021); Chan, Golub, LeVeque (1983), equation 1.7; Zhang,
Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from turbo_tvm.ops import L2Normalize, Norm
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro, Space, Variant
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.cuda import reduction, strips
from turbo_tvm.schedules.cuda.normalize_rows import normalize_macro
from turbo_tvm.schedules.cuda.reduction import RowForm
from turbo_tvm.schedules.cuda.script import kernel_attrs
from turbo_tvm.schedules.cuda.strips import Team
from turbo_tvm.schedules.cuda.tiles import CudaTiles

REGISTERS = 72  # for the elements of two rows, which share the reads of bias, gamma and beta

VERSION = 1  # of the kernel: a tuner's log of another one says nothing about it


def space(operator: Norm | L2Normalize, _tiles: CudaTiles) -> Space:
    """Return the decisions of this kernel: how rows are spread over threads."""
    return reduction.row_space(operator.columns_out, _vector(operator), registers=REGISTERS)


def _vector(operator: Norm | L2Normalize) -> int:
    """Return the elements per access that suit all rows that are read or written."""
    residual = operator.residual if isinstance(operator, Norm) else None
    rows = (operator.x, operator.out, *((residual,) if residual is not None else ()))
    return reduction.vector_width(operator.columns_out, *rows)


def norm(
    operator: Norm,
    _tiles: CudaTiles,
    variants: Sequence[Variant] = (),
    form: RowForm | None = None,
    bias: bool = False,
) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, [residual,] [bias,] gamma, [beta,] out)`: rows v = x [+ residual] [+ bias], normalised.

    Layer norm is (v - mean v) / sqrt(var v + eps) * gamma + beta, RMS norm v / sqrt(mean v^2 + eps) * gamma.
    variants: one setting of `space` at most.
    form: how rows are spread over threads, in the place of variants.
    bias: whether there is such a vector, of the dtype of gamma.
    """
    kind = "rms" if operator.is_rms else "layer"
    return _norm_kernel(operator, _Sum(kind, operator.residual, bias, operator.gamma.dtype), variants, form)


def l2_normalize(operator: L2Normalize, _tiles: CudaTiles, variants: Sequence[Variant] = ()) -> tvm.tirx.PrimFunc:
    """Return the kernel `(x, out)`: rows v / max(|v|, eps). variants: one setting of `space` at most."""
    return _norm_kernel(operator, _Sum("l2"), variants, None)


@dataclass(frozen=True)
class _Sum:
    """What is normalised, and how."""

    kind: str  # of `normalize_macro`
    residual: Operand | None = None  # rows that are added
    bias: bool = False  # whether a vector is added
    vectors: str = "float32"  # dtype of bias, gamma and beta


def _norm_kernel(
    operator: Norm | L2Normalize, summands: _Sum, variants: Sequence[Variant], form: RowForm | None
) -> tvm.tirx.PrimFunc:
    n, x_rows, out_rows, kind = operator.columns_out, operator.x, operator.out, summands.kind
    residual, bias, vectors = summands.residual is not None, summands.bias, summands.vectors
    extra_rows = summands.residual or Operand.rows(n)
    form = form or reduction.chosen_form(n, _vector(operator), variants, registers=REGISTERS)
    load = _load_sum_macro(form, x_rows.dtype, extra_rows.dtype if residual else None, vectors if bias else None)
    normalize = normalize_macro(form, eps=operator.eps, kind=kind, out=out_rows, vectors=vectors)

    def summed(inputs: tuple[tvm.tirx.Buffer, ...], team: Team) -> Macro:
        """Return `load(strip, segment)` for `normalize`."""

        @T.inline
        def load_strip(strip, segment):
            load(strip, inputs, team, segment)

        return load_strip

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
                    inputs = T.meta_var((source, residual_rows, vector))
                    normalize(summed(inputs, team), team, gamma, beta, result)

    absent = [*([] if residual else ["residual_rows"]), *([] if bias else ["vector"])]
    absent += {"layer": [], "rms": ["beta"], "l2": ["gamma", "beta"]}[kind]
    return without_parameters(kernel, absent)


def _load_sum_macro(form: RowForm, x: str, residual: str | None, bias: str | None) -> Macro:
    """Return `load(strip, inputs, team, segment)`: fill the strip with the sum of (x, residual, bias).

    x, residual, bias: their dtypes; None for what is not added.
    """
    load_x = strips.load_rows_macro(form, x)
    load_residual = strips.load_rows_macro(form, residual or x, added=True)
    add_bias = strips.add_vector_macro(form, bias or x)

    @T.inline
    def load(strip, inputs, team, segment):
        # 1. the sum of the inputs, in registers
        load_x(strip, inputs[0], team, segment)
        if residual is not None:
            load_residual(strip, inputs[1], team, segment)
        if bias is not None:
            add_bias(strip, inputs[2], team, segment)

    return load
