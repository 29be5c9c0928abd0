"""TVM tensors at an address. TVM's own views have a byte offset, which compiled functions do not accept.

They are made through DLPack, the exchange format of array libraries: version 1 of its managed tensor (dlpack.h).
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

_NAME = b"dltensor"
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode, by NumPy's kind


_Int64s = ctypes.POINTER(ctypes.c_int64)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", _Int64s),
        ("strides", _Int64s),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


# A header lies in memory from C's malloc, and its deleter is C's free: it may be called when no Python runs any more.
_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Exporter:
    def __init__(self, address: int, device: tuple[int, int]):
        self._address, self._device = address, device

    def __dlpack__(self, **_options: Any) -> Any:
        return _new_capsule(self._address, _NAME, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


def tensor_at(address: int, dtype: np.dtype, shape: tuple[int, ...], device: tuple[int, int]) -> Any:
    """Return TVM's tensor on the memory at an address, row-major; it must live no longer than that memory.

    device: DLPack's type and number, (2, 0) for the first NVIDIA GPU. Raises MemoryError if there is none for a header.
    """
    import tvm

    rank = len(shape)
    header = _libc.malloc(ctypes.sizeof(_Managed) + 16 * rank)
    if not header:
        raise MemoryError("there is no memory for a tensor's header")
    dimensions = (ctypes.c_int64 * (2 * rank)).from_address(header + ctypes.sizeof(_Managed))
    dimensions[:] = [*shape, *(math.prod(shape[i + 1 :]) for i in range(rank))]
    extents = ctypes.cast(ctypes.addressof(dimensions), _Int64s)
    strides = ctypes.cast(ctypes.addressof(dimensions) + 8 * rank, _Int64s)
    managed = _Managed.from_address(header)
    managed.tensor = _Tensor(address, *device, rank, _CODES[dtype.kind], dtype.itemsize * 8, 1, extents, strides, 0)
    managed.context, managed.deleter = None, _FREE
    return tvm.runtime.from_dlpack(_Exporter(header, device))
