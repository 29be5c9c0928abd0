"""The response cache: answers by request, the least recently used ones dropped first. Thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.batch import Batch

ENTRY_BYTES = 256  # about what an entry takes beside its key and its arrays


def request_key(prefix: bytes, request: Batch) -> bytes:
    """Return the key of a request: the prefix, which names model and output, the token ids and the token types.

    Token ids are not hashed, which would take longer; images are, since their own bytes would fill the cache.
    """
    if request.images is not None:
        return b"".join((prefix, *(sha256(image.data).digest() for image in request.images)))
    ids = request.token_ids.tobytes()
    return b"".join((prefix, len(ids).to_bytes(8, "little"), ids, request.token_type_ids.tobytes()))


def own_copy(answer: Any) -> Any:
    """Return a copy of the answer: an array, or named arrays in a mapping of the same class."""
    if isinstance(answer, Mapping):
        return type(answer)((name, own_copy(value)) for name, value in answer.items())  # type: ignore[call-arg]
    return np.array(answer)


class ResponseCache:
    """Keeps answers of up to `max_bytes` bytes; 0 keeps none. Several engines may share one: keys name the model."""

    def __init__(self, max_bytes: int):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise InputError(f"the size of the response cache is a number of bytes from 0, not {max_bytes!r}")
        self.max_bytes = max_bytes
        self.bytes_held = 0
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Any:
        """Return a copy of the answer with this key, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
        return own_copy(found[0])  # kept answers are never written to

    def put(self, key: bytes, answer: Any) -> None:
        """Keep a copy of the answer, unless it is larger than the whole cache."""
        size = _bytes_of(answer) + len(key) + ENTRY_BYTES
        if size > self.max_bytes:
            return
        try:
            kept = own_copy(answer)
        except MemoryError:  # the caller has the answer: it is only not kept
            return
        with self._lock:
            self._drop(key)
            self._entries[key] = kept, size
            self.bytes_held += size
            while self.bytes_held > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Drop every answer."""
        with self._lock:
            self._entries.clear()
            self.bytes_held = 0

    def _drop(self, key: bytes) -> None:
        old = self._entries.pop(key, None)
        self.bytes_held -= old[1] if old else 0


def _bytes_of(answer: Any) -> int:
    if isinstance(answer, Mapping):
        return sum(_bytes_of(value) for value in answer.values())
    return int(np.asarray(answer).nbytes)
