"""Loading an artifact's code: a shared library that exists as verified bytes only."""

import os
import struct
import tempfile
from typing import Any

from turbo_tvm.errors import ArtifactError

__all__ = ["load_library"]

# The parts of a 64-bit little-endian ELF file that say which of its bytes are mapped.
_ELF_HEADER = struct.Struct("<6s26xQ14xHH6x")  # magic; program headers: offset, bytes each, count
_SEGMENT = struct.Struct("<I4xQ16xQ16x")  # type, offset, bytes in the file
_LOADED = 1


def load_library(data: bytes) -> Any:
    """Return the TVM module in a shared library's bytes, which the caller has verified.

    The bytes pass through a file in a directory that only this user can enter (mode 0700); both are gone when
    this returns: the loader keeps its own mapping. Raises ArtifactError if there is no room for the file, or if it
    cannot be loaded.
    """
    import tvm

    if not _is_whole(data):
        raise ArtifactError(
            f"the artifact's code ({len(data)} bytes) is not a whole shared library: compile the model again"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="turbo-tvm-") as directory:
            path = os.path.join(directory, "library.so")
            with open(path, "xb") as file:
                file.write(data)
            return _load(tvm, path)
    except OSError as error:
        raise ArtifactError(
            f"cannot unpack the artifact's code, {len(data)} bytes, into a temporary directory ({error}): "
            "free some space there, or let TMPDIR name a directory that you can write to"
        ) from error


def _is_whole(data: bytes) -> bool:
    """Return whether every segment lies inside the file: the system's loader maps what does not, and crashes."""
    try:
        magic, offset, size, count = _ELF_HEADER.unpack_from(data)
        segments = [_SEGMENT.unpack_from(data, offset + index * size) for index in range(count)]
    except (struct.error, OverflowError):
        return False
    inside = all(start + length <= len(data) for kind, start, length in segments if kind == _LOADED)
    return magic == b"\x7fELF\x02\x01" and inside


def _load(tvm: Any, path: str) -> Any:
    try:
        return tvm.runtime.load_module(path)
    except Exception as error:  # TVM raises many types, and none of them is the caller's to know
        raise ArtifactError(
            f"the artifact's code cannot be loaded: {error}. If the directory for temporary files forbids "
            "programs (noexec), let TMPDIR name another; else compile the model again here"
        ) from error
