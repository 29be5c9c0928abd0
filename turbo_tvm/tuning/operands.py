"""The arguments of a kernel for a batch: arrays of what each operand is for, with values that make sense there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.ops import Attention, Linear, Operator, Pool, formats
from turbo_tvm.ops.operand import Operand, Role
from turbo_tvm.ops.operator import Argument
from turbo_tvm.runtime.batch import cu_seqlens_of, query_tiles

_WEIGHTS = (Role.WEIGHT, Role.TABLE, Role.VECTOR)
_TABLE_ROWS = 1024  # of a table that may have any number


@dataclass(frozen=True)
class Arrays:
    """The arguments of a kernel, in order, and its output. One array may be several arguments."""

    arguments: tuple[np.ndarray, ...]
    out: np.ndarray
    bound_by_weights: bool  # whether weights are most of the bytes


def arrays(recipe: KernelRecipe, lengths: Sequence[int], seed: int = 0) -> Arrays:
    """Return arguments for a batch of sequences of these lengths in tokens.

    Numbers are as those of activations and weights. Ids are rows of the table that they index. Queries, keys and values
    are one array where they lie in one.
    """
    return _Maker(recipe, lengths, np.random.default_rng(seed)).arrays()


class _Maker:
    """Makes the arrays of one kernel and batch."""

    def __init__(self, recipe: KernelRecipe, lengths: Sequence[int], rng: np.random.Generator):
        self.operator: Operator = recipe.operator
        self.rng = rng
        self.cu_seqlens = cu_seqlens_of(list(lengths))
        self.query_tiles = query_tiles(self.cu_seqlens, recipe.tiles.query_tile)
        self.row_tile = recipe.tiles.row_tile

    def arrays(self) -> Arrays:
        found: dict[str, np.ndarray] = {}
        shared = self.operator.buffer_of() if isinstance(self.operator, Attention) else {}
        made: list[np.ndarray] = []
        for argument in self.operator.arguments():
            owner = shared.get(argument.name, argument.name)
            if owner == argument.name:
                found[owner] = self._array(argument, len(made))
            made.append(found[owner])
        result = self.operator.out
        shape = self._shape(result, Role.ROWS, of_sequences=isinstance(self.operator, Pool))
        out = self._numbers(shape, result)
        roles = [argument.role for argument in self.operator.arguments()]
        rows = {id(array): array.nbytes for array, role in zip(made, roles, strict=True) if role is Role.ROWS}
        weights = sum(array.nbytes for array, role in zip(made, roles, strict=True) if role in _WEIGHTS)
        return Arrays(tuple(made), out, weights > sum(rows.values()) + out.nbytes)

    def _array(self, argument: Argument, position: int) -> np.ndarray:
        operand = argument.tensor
        if argument.role is Role.INDICES:
            return self.rng.integers(
                0, self._rows_indexed(argument, position), self._shape(operand, argument.role), np.int32
            )
        if argument.role is Role.QUERY_TILES:
            return self.query_tiles
        if argument.role in (Role.CU_SEQLENS, Role.POOLED_ROWS):
            return self._places()
        scale = 1.0
        if argument.role is Role.WEIGHT and isinstance(self.operator, Linear):
            scale = self.operator.k**-0.5  # so that products with it stay as large as x
        return self._numbers(self._shape(operand, argument.role), operand, scale)

    def _places(self) -> np.ndarray:
        """Return where sequences begin, and the end; where a row behind such a place is read, it is in the batch."""
        if isinstance(self.operator, Pool) and self.operator.mode == "first":
            return np.minimum(self.cu_seqlens, max(0, int(self.cu_seqlens[-1]) - 1 - self.operator.row))
        return self.cu_seqlens

    def _rows_indexed(self, argument: Argument, position: int) -> int:
        """Return how many rows the operand has that this one indexes; the i-th of several indexes the i-th."""
        alike = [i for i, other in enumerate(self.operator.arguments()) if other.name == argument.name]
        indexed = getattr(self.operator, argument.of)
        table = indexed[alike.index(position)] if isinstance(indexed, tuple) else indexed
        return table.shape[0] or _TABLE_ROWS

    def _shape(self, operand: Operand, role: Role, of_sequences: bool = False) -> tuple[int, ...]:
        rows = len(self.cu_seqlens) - 1 if of_sequences else int(self.cu_seqlens[-1])
        if role not in (Role.ROWS, Role.INDICES):
            lead = _TABLE_ROWS
        else:  # rows of two dimensions are not in tiles
            lead = -(-rows // self.row_tile) if role is Role.INDICES or len(operand.shape) > 2 else rows
        return tuple(lead if d is None else d for d in operand.shape)

    def _numbers(self, shape: tuple[int, ...], operand: Operand, scale: float = 1.0) -> np.ndarray:
        """Return normal numbers, in the format of the operand."""
        stored = formats.of_words(operand.dtype)
        per_element = formats.per_element(operand.dtype)
        values = (self.rng.standard_normal((*shape[:-1], shape[-1] * per_element), np.float32) * scale).astype(
            np.float32
        )
        if stored == formats.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(operand.dtype)
        return values.astype(operand.dtype)
