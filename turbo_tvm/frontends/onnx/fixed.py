"""Loosen dimensions that an ONNX file fixes: a graph traced at (1, 128) becomes one for any batch and length up to 128.

Such a file has the numbers in its reshapes and constants. Where the activations that a reshape reads are symbolic, the
numbers of its target that stand for batch and length are found again; constants as long as the sequence (positions,
masks) are cut to it. What a number stands for can be ambiguous, so the compiled model is compared with the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from turbo_tvm.frontends.onnx.extents import factors


class Loosen:
    """Puts symbolic dimensions in the place of fixed ones; does nothing for a file that fixes none."""

    def __init__(self, dims: Sequence[tirx.Var], fixed: Sequence[int | None] = ()):
        """dims: the symbolic batch and length. fixed: the numbers that the file has in their place, None for none."""
        self.batch, self.length = dims
        self.batch_size, self.sequence = fixed or (None, None)

    def cut(self, shape: Sequence[int]) -> tuple[list[int], list[tirx.Var]]:
        """Return the axes of a constant that are as long as the sequence, and where each must end."""
        if not self.sequence or self.sequence == 1:
            return [], []
        axes = [axis for axis, extent in enumerate(shape) if extent == self.sequence]
        return axes, [self.length] * len(axes)

    def shape(self, dims: Sequence[Any]) -> list[Any]:
        """Return the extents that a constant or a broadcast gets: a batch of 1 broadcasts as it is."""
        loose = [self.length if self.sequence and self.sequence > 1 and _is(d, self.sequence) else d for d in dims]
        if self.batch_size and self.batch_size > 1 and loose and _is(loose[0], self.batch_size):
            loose[0] = self.batch
        return loose

    def is_length(self, value: int) -> bool:
        """Return whether a number stands for the length."""
        return bool(self.sequence and self.sequence > 1 and value == self.sequence)

    def all_tokens(self, ids: np.ndarray, dims: Sequence[Any]) -> list[Any] | None:
        """Return the shape of a look-up of every token in its place; None if it is another look-up.

        ids: what is looked up. dims: the shape of the data, a row per token.
        """
        symbols = factors(dims[:1])[1]
        tokens = all(any(s.same_as(d) for s in symbols) for d in (self.batch, self.length))
        if not self.batch_size or not self.sequence or self.sequence == 1 or not tokens:
            return None
        count = self.batch_size * self.sequence
        if ids.size != count or not np.array_equal(ids.reshape(-1), np.arange(count)):
            return None
        axis = list(ids.shape).index(self.sequence) if self.sequence in ids.shape else 0
        if axis == 0 or any(d != 1 for i, d in enumerate(ids.shape) if i not in (0, axis)):
            return None
        shape = [self.batch if i == 0 else self.length if i == axis else 1 for i in range(ids.ndim)]
        return [*shape, *dims[1:]]

    def reshape(self, source: Sequence[Any], target: Sequence[Any]) -> list[Any]:
        """Return the target of a reshape with the symbols that its source has, each at the first number that fits."""
        loose = list(target)
        if self.batch_size is None and self.sequence is None:
            return loose
        symbols = factors(source)[1]
        merged = self._merged(loose, symbols)
        if merged is not None:
            return merged
        present = [any(s.same_as(d) for s in symbols) for d in (self.batch, self.length)]
        kept = [d for i, d in enumerate(source) if i < len(target) and _is(target[i], 0)]  # 0: as in the source
        given = factors([*kept, *(d for d in target if not isinstance(d, int | np.integer))])[1]
        for dim, size, needed in zip((self.batch, self.length), (self.batch_size, self.sequence), present, strict=True):
            if size and needed and not any(g.same_as(dim) for g in given):
                _place(loose, dim, size)
        return loose

    def _merged(self, dims: list[Any], symbols: Sequence[Any]) -> list[Any] | None:
        """Return a target in which one number stands for all tokens of the batch; None if none does."""
        if not self.batch_size or not self.sequence or self.sequence == 1:
            return None
        both = all(any(s.same_as(d) for s in symbols) for d in (self.batch, self.length))
        found = [i for i, d in enumerate(dims) if _is(d, self.batch_size * self.sequence)]
        if not both or not found or any(_is(d, self.sequence) for i, d in enumerate(dims) if i != found[0]):
            return None
        if self.batch_size == 1 and found[0] > 0:  # behind another dimension it is the length alone
            return None
        return [self.batch * self.length if i == found[0] else d for i, d in enumerate(dims)]


def _place(dims: list[Any], symbol: tirx.Var, size: int) -> None:
    """Write the symbol over the first number that it stands for, or that holds it as a factor."""
    numbers = [i for i, d in enumerate(dims) if isinstance(d, int | np.integer) and d > 0]
    exact = [i for i in numbers if dims[i] == size]
    parts = [i for i in numbers if int(dims[i]) % size == 0]
    if exact:
        dims[exact[0]] = symbol
    elif parts and not any(_is(d, -1) for d in dims):  # else it is a factor of the rest
        dims[parts[0]] = symbol * (int(dims[parts[0]]) // size)


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int | np.integer) and int(value) == number
