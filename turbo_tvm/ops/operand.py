"""Operands of an operator: what each of its tensors is for, and its shape and dtype where no graph is at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import tvm
from tvm import relax

from turbo_tvm.ops import formats

Tensor = Any  # a Relax expression in a graph (a Relax type for `out`), an `Operand` in a kernel


class Role(Enum):
    """What an operand holds; the tuner makes its arrays by this, and costs are counted by it."""

    ROWS = "a row of numbers per token or sequence"
    INDICES = "row numbers of another operand"
    MASK = "1 for tokens, 0 for padding, of a graph that is still padded"
    QUERY_TILES = "(first row, begin, end) of each task of attention"
    CU_SEQLENS = "where each sequence begins, and the end"
    POOLED_ROWS = "the row of the token that each sequence is pooled to"
    WEIGHT = "a matrix that rows are multiplied with"
    TABLE = "rows or columns that are looked up"
    VECTOR = "a number per column"


@dataclass(frozen=True)
class Operand:
    """Shape and dtype of a tensor of a kernel, whatever graph it stands in."""

    shape: tuple[int | None, ...]  # None where the batch decides
    dtype: str

    @staticmethod
    def rows(width: int, dtype: str = formats.FP32.storage, row_tile: int = 1) -> Operand:
        """Return rows of a batch, `(tiles, row_tile, width)`."""
        return Operand((None, row_tile, width), dtype)

    @staticmethod
    def of(tensor: Tensor) -> Operand:
        """Return the operand of an expression or a type of a graph."""
        shape = tuple(d if isinstance(d, int) else None for d in dims(tensor))
        return Operand(shape, dtype_of(tensor))

    @property
    def width(self) -> int:
        """Columns of the buffer, of which the first are used."""
        return int(self.shape[-1] or 0)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return tvm.DataType(self.dtype).itemsize

    @property
    def line(self) -> int:
        """Columns in a cache line."""
        return formats.LINE_BYTES // self.itemsize


def operand(role: Role, *, optional: bool = False, several: bool = False, of: str = "") -> Any:
    """Declare a tensor of an operator.

    optional: None where it is not given. several: a tuple of tensors. of: for `INDICES`, the operand that they index.
    """
    metadata = {"role": role, "several": several, "of": of}
    return dataclasses.field(default=None, metadata=metadata) if optional else dataclasses.field(metadata=metadata)


def dims(tensor: Tensor) -> list:
    """Return the dimensions of an expression, a type or an operand, ints and symbols; [] if they are unknown."""
    if isinstance(tensor, Operand):
        return list(tensor.shape)
    ty = tensor if isinstance(tensor, relax.Type) else tensor.ty
    if not isinstance(ty, relax.TensorType) or ty.shape is None or not isinstance(ty.shape, relax.ShapeExpr):
        return []
    return [int(d) if isinstance(d, int) or hasattr(d, "value") else d for d in ty.shape.values]


def dtype_of(tensor: Tensor) -> str:
    """Return the dtype of an expression, a type or an operand."""
    if isinstance(tensor, Operand):
        return tensor.dtype
    return str((tensor if isinstance(tensor, relax.Type) else tensor.ty).dtype)


def width(tensor: Tensor) -> int:
    """Return the last dimension, which is always a number."""
    return int(dims(tensor)[-1])


def is_fixed(tensor: Tensor) -> bool:
    """Return whether no dimension depends on the batch: a weight, a table, a vector."""
    return all(isinstance(d, int) for d in dims(tensor))


def size_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor of fixed shape."""
    return tvm.DataType(dtype_of(tensor)).itemsize * math.prod(dims(tensor))


def row_bytes(tensor: Tensor) -> int:
    """Return the bytes of one row of `(tiles, row_tile, columns...)`."""
    return tvm.DataType(dtype_of(tensor)).itemsize * math.prod(dims(tensor)[2:])


def same_dimension(left: Any, right: Any) -> bool:
    """Return whether two dimensions are the same symbol or number."""
    return left == right if isinstance(left, int) or isinstance(right, int) else left.same_as(right)


def alike(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same dtype and spell the same shape."""
    return dtype_of(left) == dtype_of(right) and [str(d) for d in dims(left)] == [str(d) for d in dims(right)]


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return expressions without repetition, in order; of operands all, since they have no identity."""
    found: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, Operand) or not any(tensor.same_as(other) for other in found):
            found.append(tensor)
    return found
