"""The memory of a model's inputs and of a packed model's intermediates, kept between calls and grown when a batch needs
more."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import tvm

from turbo_tvm.runtime.manifest import BufferSpec

ALIGNMENT = 64  # bytes; vector kernels use aligned stores
GROWTH = 1.25  # room for the next, slightly longer batch
KEPT_SHAPES = 64  # views are kept for so many recent batch shapes


class Buffers:
    """Gives every buffer of a compiled function its tensor for a batch of some size.

    Steady state allocates nothing: memory grows to the largest batch seen, and the views of a shape are made once.
    """

    def __init__(self, specs: Sequence[BufferSpec], row_tile: int):
        self._specs = tuple(specs)
        self._row_tile = row_tile
        self._memory: dict[int, np.ndarray] = {}
        self._views: OrderedDict[tuple[int, int], list[tvm.runtime.Tensor]] = OrderedDict()

    @property
    def bytes_held(self) -> int:
        """Bytes of all slots together."""
        return sum(block.nbytes for block in self._memory.values())

    def tensors(self, token_tiles: int, sequence_tiles: int) -> list[tvm.runtime.Tensor]:
        """The buffers in call order, each (tiles, row_tile, columns) or (tiles, row_tile), 64-byte aligned."""
        key = (token_tiles, sequence_tiles)
        if key not in self._views:
            self._grow(key)
            self._views[key] = [self._view(spec, key) for spec in self._specs]
            while len(self._views) > KEPT_SHAPES:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]

    def _grow(self, key: tuple[int, int]) -> None:
        for spec in self._specs:
            need = self._bytes(spec, key)
            held = self._memory.get(spec.slot)
            if held is None or held.nbytes < need:
                self._views.clear()  # they look at the memory that is replaced
                self._memory[spec.slot] = aligned_empty(need if held is None else int(need * GROWTH))

    def _shape(self, spec: BufferSpec, key: tuple[int, int]) -> tuple[int, ...]:
        tiles = key[0] if spec.kind == "token" else key[1]
        return (tiles, self._row_tile, spec.columns) if spec.columns else (tiles, self._row_tile)

    def _bytes(self, spec: BufferSpec, key: tuple[int, int]) -> int:
        return math.prod(self._shape(spec, key)) * np.dtype(spec.dtype).itemsize

    def _view(self, spec: BufferSpec, key: tuple[int, int]) -> tvm.runtime.Tensor:
        block = self._memory[spec.slot][: self._bytes(spec, key)]
        return tvm.runtime.from_dlpack(block.view(spec.dtype).reshape(self._shape(spec, key)))


class Input:
    """One input of a compiled function: memory that every call fills anew, with the tensors of recent shapes.

    A tensor of TVM's own costs 12 us, and 100 if the caches are cold; this costs 0.5.
    """

    def __init__(self, dtype: str):
        self._memory = aligned_empty(0).view(dtype)
        self._views: dict[tuple[int, ...], tuple[np.ndarray, tvm.runtime.Tensor]] = {}

    def tensor(self, values: np.ndarray) -> tvm.runtime.Tensor:
        """The values, until the next call."""
        view = self._views.get(values.shape) or self._view(values.shape)
        view[0][...] = values
        return view[1]

    def _view(self, shape: tuple[int, ...]) -> tuple[np.ndarray, tvm.runtime.Tensor]:
        size, dtype = math.prod(shape), self._memory.dtype
        if size > self._memory.size:
            self._views.clear()
            self._memory = aligned_empty(int(size * GROWTH) * dtype.itemsize).view(dtype)
        elif len(self._views) == KEPT_SHAPES:
            del self._views[next(iter(self._views))]
        array = self._memory[:size].reshape(shape)
        self._views[shape] = array, tvm.runtime.from_dlpack(array)
        return self._views[shape]


def aligned_empty(size: int) -> np.ndarray:
    """Uninitialised memory of `size` bytes as a uint8 array that starts on a 64-byte boundary."""
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size]
