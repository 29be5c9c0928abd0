"""Tensors of the Open Inference Protocol, from and to JSON, the binary extension and gRPC. Pure functions."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbo_tvm.server import errors
from turbo_tvm.server.errors import Problem

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BYTES = "BYTES"


@dataclass(frozen=True)
class Tensor:
    """A named array; one of BYTES is an array of `bytes` objects."""

    name: str
    array: np.ndarray

    @property
    def datatype(self) -> str:
        """The protocol's name of the array's type."""
        return BYTES if self.array.dtype == object else NAMES[self.array.dtype]


def from_values(name: str, datatype: str, shape: Sequence[int], values: Any) -> Tensor:
    """Make a tensor of a list of values, flat or nested. Raises Problem if they do not fit datatype and shape."""
    size = _size(name, datatype, shape)
    if datatype == BYTES:
        flat = list(_flat(values))
        if not all(isinstance(value, str | bytes) for value in flat):
            raise _wrong(name, "BYTES in JSON are strings")
        array = np.empty(len(flat), object)
        array[:] = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in flat]
    else:
        try:
            if not all(isinstance(value, int | float) for value in _flat(values)):  # NumPy would pad strings first
                raise ValueError("they are no numbers")
            array = np.asarray(values).reshape(-1)
            if array.dtype.kind not in ("iu" if DTYPES[datatype].kind in "iu" else "iufb"):
                raise ValueError("they are not numbers of that type")
            if not np.isfinite(array).all() or (_whole(datatype) and not _fits(array, datatype)):
                raise ValueError("a number is out of range")
            array = array.astype(DTYPES[datatype])
        except (TypeError, ValueError, OverflowError) as error:
            raise _wrong(name, f"its data is no list of {datatype}: {error}") from None
    if len(array) != size:
        raise _wrong(name, f"its shape {list(shape)} has {size} values, its data {len(array)}")
    return Tensor(name, array.reshape(tuple(shape)))


def from_bytes(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """Make a tensor of the protocol's bytes. Raises Problem if they do not fit datatype and shape.

    They are little-endian, row by row; each of BYTES comes after its length in 4 bytes.
    """
    size = _size(name, datatype, shape)
    if datatype == BYTES:
        parts = _split(name, raw, size)
        array = np.empty(len(parts), object)
        array[:] = parts
        return Tensor(name, array.reshape(tuple(shape)))
    wanted = size * DTYPES[datatype].itemsize
    if len(raw) != wanted:
        raise _wrong(name, f"its shape {list(shape)} of {datatype} takes {wanted} bytes, not {len(raw)}")
    return Tensor(name, np.frombuffer(raw, DTYPES[datatype].newbyteorder("<")).reshape(tuple(shape)))


def to_bytes(tensor: Tensor) -> bytes:
    """Return a tensor as the protocol's bytes, which `from_bytes` reads."""
    if tensor.datatype == BYTES:
        return b"".join(struct.pack("<I", len(value)) + value for value in tensor.array.reshape(-1))
    return np.ascontiguousarray(tensor.array, tensor.array.dtype.newbyteorder("<")).tobytes()


def texts(tensor: Tensor) -> list[str]:
    """Return the strings of a tensor of BYTES. Raises Problem for one that is not UTF-8."""
    try:
        return [value.decode() for value in tensor.array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise _wrong(tensor.name, f"a text is not UTF-8: {error}") from None


def _size(name: str, datatype: str, shape: Sequence[int]) -> int:
    if datatype != BYTES and datatype not in DTYPES:
        raise _wrong(name, f"its datatype {datatype[:50]!r} is none of {', '.join([*DTYPES, BYTES])}")
    if len(shape) > 8 or any(n < 0 or n > 2**31 for n in shape):
        raise _wrong(name, f"its shape {list(shape)[:9]} is none")
    return math.prod(shape)


def _split(name: str, raw: bytes, count: int) -> list[bytes]:
    parts: list[bytes] = []
    place = 0
    while place + 4 <= len(raw) and len(parts) < count:
        (length,) = struct.unpack_from("<I", raw, place)
        parts.append(raw[place + 4 : place + 4 + length])
        place += 4 + length
    if place != len(raw) or len(parts) != count:
        raise _wrong(name, f"its bytes are not {count} strings, each after its length in 4 bytes")
    return parts


def _flat(values: Any) -> Any:
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, list | tuple):
            pending.extend(reversed(value))
        else:
            yield value


def _whole(datatype: str) -> bool:
    return DTYPES[datatype].kind in "iu"


def _fits(array: np.ndarray, datatype: str) -> bool:
    info = np.iinfo(DTYPES[datatype])
    return not len(array) or (int(array.min()) >= info.min and int(array.max()) <= info.max)


def _wrong(name: str, why: str) -> Problem:
    return Problem(errors.INVALID, f"the tensor {name[:200]!r}: {why}")
