"""What the matrix kernels (`linear.py`, `linear_amx.py`) share: the product, its buffers, the kernel around it."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import Linear, formats
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Macro
from turbo_tvm.schedules.common.vector_math import Activation
from turbo_tvm.schedules.common.vector_math import activation as activation_by_name
from turbo_tvm.schedules.cpu import bf16
from turbo_tvm.schedules.cpu.normalization_rows import normalize_all_macro
from turbo_tvm.schedules.cpu.script import without_parameters
from turbo_tvm.schedules.cpu.tiles import CpuTiles


@dataclass(frozen=True)
class Product:
    """What is computed, `activation(x @ W + bias) + residual`, and how rows are stored."""

    k: int  # columns of x
    n: int  # columns of the output
    activation: str | None  # its name; None is the identity
    residual: bool  # whether there is one
    x: Operand
    extra: Operand  # of the residual
    out: Operand

    @staticmethod
    def of(operator: Linear) -> Product:
        """Return what an operator computes, but for its norm."""
        extra = operator.residual or Operand.rows(operator.n)
        given = operator.residual is not None
        return Product(operator.k, operator.n, operator.activation, given, operator.x, extra, operator.out)

    @property
    def in_bf16(self) -> bool:
        """Whether it is a product of bf16 numbers."""
        return self.x.dtype == bf16.STORAGE

    @property
    def steps(self) -> int:
        """Rows of a panel."""
        return self.k // 2 if self.in_bf16 else self.k

    @property
    def activate(self) -> Activation:
        """The activation, as exact as the output's format shows it. Raises ValueError for an unknown one."""
        return activation_by_name(self.activation, formats.of_storage(self.out.dtype))

    def add_residual(self, value: Expr, extra: tvm.tirx.Buffer, *index: Expr) -> Expr:
        """Add the residual's element at that index, if there is a residual."""
        return value + bf16.load(extra, *index) if self.residual else value


@dataclass(frozen=True)
class Operands:
    """The buffers of a call."""

    x: tvm.tirx.Buffer  # (t, R, width)
    weight: tvm.tirx.Buffer  # (P, rows of a panel, C)
    bias: tvm.tirx.Buffer  # (P * C,)
    extra: tvm.tirx.Buffer  # the residual, (t, R, width)
    out: tvm.tirx.Buffer  # (t, R, width)


def product_kernel(
    tiles: CpuTiles, product: Product, norm_eps: float | None, multiply: Macro, llvm: str
) -> tvm.tirx.PrimFunc:
    """Return the kernel around `multiply(t, operands)`, whatever instructions that uses, and the norm if there is one.

    llvm: LLVM IR of the functions that `multiply` calls.
    """
    n, rows, columns, panels = product.n, tiles.row_tile, tiles.col_tile, tiles.panels(product.n)
    normalized = norm_eps is not None
    normalize_all = normalize_all_macro(tiles.lanes, n, norm_eps or 0.0)
    weight_type = bf16.PAIR if product.in_bf16 else "float32"

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x_arg: T.handle,
        weight: T.Buffer((panels, product.steps, columns), weight_type),
        bias: T.Buffer((panels * columns,), "float32"),
        residual_arg: T.handle,
        gamma: T.Buffer((n,), "float32"),
        beta: T.Buffer((n,), "float32"),
        out_arg: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        t = T.int64()
        source = T.match_buffer(x_arg, (t, rows, product.x.width), product.x.dtype)
        residual_rows = T.match_buffer(residual_arg, (t, rows, product.extra.width), product.extra.dtype)
        result = T.match_buffer(out_arg, (t, rows, product.out.width), product.out.dtype)
        with T.attr(T.int32(0), "pragma_import_llvm", llvm):
            operands = T.meta_var(Operands(source, weight, bias, residual_rows, result))
            multiply(t, operands)
            if normalized:
                # 5. (6. with AMX) the norm needs whole rows: a second parallel loop normalises in place
                normalize_all(result, None, result, gamma, beta)

    absent = [] if product.residual else ["residual_rows"]
    return without_parameters(kernel, absent if normalized else [*absent, "gamma", "beta"])
