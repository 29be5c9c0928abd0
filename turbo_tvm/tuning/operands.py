"""The arguments of a kernel for a batch: shapes from its parameters, values by what they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import tirx

from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.runtime.batch import boundaries, query_tiles

_TABLE_ROWS = 1024  # of an embedding's table
_QUERY_TILE = 32


def operands(recipe: KernelRecipe, kernel: tirx.PrimFunc, lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Arrays for the kernel's parameters, in order; the last one is the output.

    Numbers are as those of activations and weights. Queries, keys and values are one array where they lie in one.
    """
    maker = _Maker(recipe, lengths, np.random.default_rng(seed))
    return [maker.array(param) for param in kernel.params]


class _Maker:
    def __init__(self, recipe: KernelRecipe, lengths: Sequence[int], rng: np.random.Generator):
        row_tile = getattr(recipe.tiles, "row_tile", 1)
        query_tile = getattr(recipe.tiles, "query_tile", _QUERY_TILE)
        bounds = boundaries(list(lengths))
        self.rng = rng
        self.tasks = query_tiles(bounds, query_tile)
        self.sizes = {"t": -(-sum(lengths) // row_tile), "m": sum(lengths), "nq": len(self.tasks)}
        self.merged: dict[tuple, np.ndarray] = {}

    def array(self, param: tirx.Var) -> np.ndarray:
        name, dtype = str(param.name), str(param.dtype)
        if name == "query_tiles":
            return self.tasks
        shape = tuple(self._size(d) for d in param.shape)
        if name.startswith("ids"):
            return self.rng.integers(0, _TABLE_ROWS, shape, np.int32)
        if name.startswith(("q_", "k_", "v_")):
            return self.merged.setdefault((shape, dtype), self._numbers(shape, dtype))
        return self._numbers(shape, dtype)

    def _size(self, dimension: object) -> int:
        if isinstance(dimension, int):
            return dimension
        if hasattr(dimension, "value"):
            return int(dimension.value)
        return self.sizes.get(str(getattr(dimension, "name", "")), _TABLE_ROWS)

    def _numbers(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Normal numbers; a matrix of weights is scaled so that products with it stay as large as x."""
        scale = 1.0 / np.sqrt(shape[-2]) if len(shape) == 3 and shape[0] not in self.sizes.values() else 1.0
        if dtype == "int32":  # pairs of bf16
            halves = self._numbers((*shape[:-1], 2 * shape[-1]), "uint16")
            return halves.view(np.int32)
        values = (self.rng.standard_normal(shape, np.float32) * scale).astype(np.float32)
        if dtype == "uint16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(dtype)
