"""Devices: the places where a model's tensors lie, which are this machine's memory or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tvm

from turbo_tvm.runtime.device.dlpack import tensor_at
from turbo_tvm.runtime.memory.planner import ALIGNMENT

GROWTH = 1.25  # room for the next, slightly longer batch
KEPT_SHAPES = 64  # tensors are kept for so many recent batch shapes

Block = Any  # memory: an array of bytes here, TVM's tensor of them on a GPU


class Input(Protocol):
    """One input of a compiled function: memory that every call fills anew, with the tensors of recent shapes."""

    def tensor(self, values: np.ndarray) -> tvm.runtime.Tensor:
        """Return the values, until the next call."""


class Device(Protocol):
    """A place for tensors."""

    handle: tvm.runtime.Device  # TVM's

    def allocate(self, size: int) -> Block:
        """Return `size` bytes of uninitialised memory."""

    def view(self, block: Block, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> tvm.runtime.Tensor:
        """Return a tensor in a block, from byte `offset` on, which must live no longer than the block."""

    def upload(self, array: np.ndarray) -> tvm.runtime.Tensor:
        """Return a tensor of an array's values; it may use the array's memory, which is aligned."""

    def download(self, tensor: tvm.runtime.Tensor) -> np.ndarray:
        """Return a tensor's values, once they are there; they may be overwritten by the next call."""

    def input(self, dtype: str) -> Input:
        """Return memory for an input of this dtype."""

    def wait(self) -> None:
        """Wait until all kernels that were launched are done."""


class Host:
    """This machine's memory: tensors are views of arrays."""

    handle = tvm.cpu()

    def allocate(self, size: int) -> np.ndarray:
        """Return `size` bytes from a 64-byte boundary on."""
        return aligned_empty(size)

    def view(self, block: np.ndarray, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> tvm.runtime.Tensor:
        """Return a view of the block."""
        region = block[offset : offset + math.prod(shape) * dtype.itemsize]
        return tvm.runtime.from_dlpack(region.view(dtype).reshape(shape))

    def upload(self, array: np.ndarray) -> tvm.runtime.Tensor:
        """Return a view of the array, which must outlive it."""
        return tvm.runtime.from_dlpack(array)

    def download(self, tensor: tvm.runtime.Tensor) -> np.ndarray:
        """Return a view of the tensor."""
        return np.from_dlpack(tensor)

    def input(self, dtype: str) -> HostInput:
        """Return memory for an input of this dtype."""
        return HostInput(dtype)

    def wait(self) -> None:
        """Do nothing: kernels are done when they return."""


class Gpu:
    """An NVIDIA GPU. Copies and kernels run in order on TVM's stream; `download` waits for them."""

    def __init__(self, index: int = 0):
        self.handle = tvm.cuda(index)

    def allocate(self, size: int) -> tvm.runtime.Tensor:
        """Return device memory from a 256-byte boundary on. Raises MemoryError if the GPU has no more."""
        try:
            return tvm.runtime.empty((max(1, size),), "uint8", self.handle)
        except Exception as error:  # TVM raises its own types for what the driver says
            raise MemoryError(f"the GPU cannot give {size:,} bytes: {error}") from error

    def view(
        self, block: tvm.runtime.Tensor, offset: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> tvm.runtime.Tensor:
        """Return a view of the block."""
        place = (self.handle.dlpack_device_type(), self.handle.index)
        return tensor_at(block.data_ptr() + offset, dtype, shape, place)

    def upload(self, array: np.ndarray) -> tvm.runtime.Tensor:
        """Return a copy on the GPU."""
        return tvm.runtime.tensor(array, self.handle)

    def download(self, tensor: tvm.runtime.Tensor) -> np.ndarray:
        """Return a copy in this machine's memory."""
        return tensor.numpy()

    def input(self, dtype: str) -> GpuInput:
        """Return memory for an input of this dtype."""
        return GpuInput(dtype, self)

    def wait(self) -> None:
        """Wait until TVM's stream is empty."""
        self.handle.sync()


class _Kept:
    """Views of one piece of memory, by shape. It grows when a shape does not fit; views of the old one are dropped."""

    def __init__(self, itemsize: int, allocate: Callable[[int], Block], view: Callable[[Block, tuple], Any]):
        self._itemsize, self._allocate, self._make = itemsize, allocate, view
        self._memory, self._bytes = allocate(0), 0
        self._views: dict[tuple[int, ...], Any] = {}

    def of(self, shape: tuple[int, ...]) -> Any:
        """Return the view of this shape."""
        found = self._views.get(shape)
        if found is not None:
            return found
        size = math.prod(shape) * self._itemsize
        if size > self._bytes:
            self._views.clear()
            self._bytes = int(size * GROWTH) // self._itemsize * self._itemsize
            self._memory = self._allocate(self._bytes)
        elif len(self._views) == KEPT_SHAPES:
            del self._views[next(iter(self._views))]
        self._views[shape] = self._make(self._memory, shape)
        return self._views[shape]


class HostInput:
    """An input in this machine's memory. A tensor of TVM's own costs 12 us, and 100 if caches are cold; this 0.5."""

    def __init__(self, dtype: str):
        kind = np.dtype(dtype)

        def view(block: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, tvm.runtime.Tensor]:
            array = block.view(kind)[: math.prod(shape)].reshape(shape)
            return array, tvm.runtime.from_dlpack(array)

        self._kept = _Kept(kind.itemsize, aligned_empty, view)

    def tensor(self, values: np.ndarray) -> tvm.runtime.Tensor:
        """Return the values, until the next call."""
        array, tensor = self._kept.of(values.shape)
        array[...] = values
        return tensor


class GpuInput:
    """An input on a GPU, copied there by every call."""

    def __init__(self, dtype: str, gpu: Gpu):
        kind = np.dtype(dtype)
        self._dtype = kind
        self._kept = _Kept(kind.itemsize, gpu.allocate, lambda block, shape: gpu.view(block, 0, kind, shape))

    def tensor(self, values: np.ndarray) -> tvm.runtime.Tensor:
        """Return the values, until the next call."""
        return self._kept.of(values.shape).copyfrom(np.ascontiguousarray(values, self._dtype))


def aligned_empty(size: int) -> np.ndarray:
    """Return `size` bytes of uninitialised memory, uint8 (size,), from a 64-byte boundary on."""
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size]
