"""Weights as a safetensors file whose tensors are aligned, so that they are used where they lie in a mapped file.

The file is 8 bytes with the header's size, the header (JSON, padded with spaces) and the tensors in order. Header and
tensors are padded to a multiple of ALIGNMENT.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from turbo_tvm.artifact.manifest import ParameterSpec
from turbo_tvm.artifact.sealed_zip import ALIGNMENT, DAMAGED, Span
from turbo_tvm.errors import ArtifactError

__all__ = ["WEIGHTS", "file_bytes", "pieces", "views"]

WEIGHTS = "weights.safetensors"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint16": "U16"}
DTYPES |= {"int8": "I8", "uint8": "U8", "bool": "BOOL"}


def file_bytes(parameters: Sequence[ParameterSpec]) -> int:
    """Return the size of the file in bytes."""
    return len(_header(parameters)) + sum(map(_padded_bytes, parameters))


def pieces(parameters: Sequence[ParameterSpec], weights: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """Yield the file in contiguous buffers of bytes; copies one tensor at a time at most."""
    yield _header(parameters)
    for spec in parameters:
        yield np.ascontiguousarray(weights[spec.name]).reshape(-1).view(np.uint8).data
        yield bytes(_padded_bytes(spec) - _exact_bytes(spec))


def views(data: mmap.mmap, span: Span, parameters: Sequence[ParameterSpec]) -> dict[str, np.ndarray]:
    """Return the weights by name, as views of where they lie.

    Raises ArtifactError unless the header is the one that `pieces` writes for these parameters.
    """
    start, stop = span
    header = _header(parameters)
    offset = start + len(header)
    if data[start:offset] != header:
        raise ArtifactError(f"{_difference(data, span, parameters)}; {DAMAGED}")
    if start % ALIGNMENT or offset + sum(map(_padded_bytes, parameters)) != stop:
        raise ArtifactError(f"its member {WEIGHTS!r} is misaligned or cut short; {DAMAGED}")
    weights = {}
    for spec in parameters:
        weights[spec.name] = np.ndarray(spec.shape, spec.dtype, data, offset)
        offset += _padded_bytes(spec)
    return weights


def _difference(data: mmap.mmap, span: Span, parameters: Sequence[ParameterSpec]) -> str:
    """Describe how the header of the weights differs from the manifest's parameters."""
    first = span[0] + 8
    header_bytes = int.from_bytes(data[span[0] : first], "little")
    try:
        found = json.loads(data[first : min(first + header_bytes, span[1])])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return f"the header of {WEIGHTS!r} is not a JSON object"
    for spec in parameters:
        entry = found.get(spec.name)
        if not isinstance(entry, dict):
            return f"parameter {spec.name!r} of the manifest is missing from {WEIGHTS!r}"
        wanted = (DTYPES[spec.dtype], list(spec.shape))
        if (entry.get("dtype"), entry.get("shape")) != wanted:
            return f"parameter {spec.name!r} is {wanted} in the manifest, but not in {WEIGHTS!r}"
    return f"the tensors in {WEIGHTS!r} are not those of the manifest in its order"


def _header(parameters: Sequence[ParameterSpec]) -> bytes:
    """Return the start of a safetensors file, padded with spaces to a multiple of ALIGNMENT.

    The tensors follow in order. Where one ends before a multiple of ALIGNMENT, a tensor of unused bytes fills the gap:
    safetensors allows no holes.
    """
    entries: dict[str, Any] = {}
    offset = 0
    for spec in parameters:
        if spec.name.startswith("__"):
            raise ArtifactError(f"weight {spec.name!r}: names with two leading underscores are safetensors' own")
        end, padded = offset + _exact_bytes(spec), offset + _padded_bytes(spec)
        dtype = DTYPES[spec.dtype]
        entries[spec.name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": [offset, end]}
        if padded > end:
            gap = {"dtype": "U8", "shape": [padded - end], "data_offsets": [end, padded]}
            entries[f"__padding__.{spec.name}"] = gap
        offset = padded
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _exact_bytes(spec: ParameterSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _padded_bytes(spec: ParameterSpec) -> int:
    return -(-_exact_bytes(spec) // ALIGNMENT) * ALIGNMENT
