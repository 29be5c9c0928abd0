"""A cache of object code on disk: bytes by key, bounded, verified before use, shared by processes without a lock.

An entry is one file named after its key, a sha256 of everything that the code depends on (`kernel_objects` makes it):

    magic, 16 bytes | sha256 of key and payload, 32 bytes | payload

Entries are written beside and renamed, so that nobody sees half of one. What does not verify (a damaged, truncated or
renamed file) is removed and counts as absent. When the entries take more than the limit, the least recently used
leave first; an entry's time of modification is when it was last used.

The entries are native code that will run, so a directory that someone else owns or may write to is not used. Nothing
that happens to the directory is an error: without a usable one, kernels are compiled as if there were no cache.

`config.py` says where the directory is and how large it may become: TURBO_TVM_KERNEL_CACHE, TURBO_TVM_KERNEL_CACHE_MB.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from turbo_tvm import config

_MAGIC = b"turbo_tvm code 1"
_HEADER_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_ENTRY = re.compile(r"[0-9a-f]{64}\.o")
_UNFINISHED = "unfinished-"  # prefix of files that are being written
_ABANDONED_S = 3600  # an unfinished file of this age has no writer left


@dataclass
class KernelCache:
    """Object code by key. Neither `get` nor `put` raises an error of the file system."""

    directory: Path | None  # None: nothing is kept
    limit_bytes: int  # of all entries together, headers included
    # what the entries took when they were last looked at, and what was added since; None: not looked at yet
    _used_bytes: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.directory is not None and not _is_private(self.directory):
            self.directory = None

    def get(self, key: str) -> bytes | None:
        """Return what is kept under this key; None if nothing is, or what is does not verify and was removed."""
        if self.directory is None:
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        payload = content[_HEADER_BYTES:]
        if content[:_HEADER_BYTES] != _header(key, payload):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return payload

    def put(self, key: str, payload: bytes) -> None:
        """Keep this under this key, if there is room for it; older entries make room."""
        size = _HEADER_BYTES + len(payload)
        if self.directory is None or size > self.limit_bytes:
            return
        with suppress(OSError):
            self._make_room(size)
            self._write(self._path(key), _header(key, payload) + payload)

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{key}.o"

    def _write(self, path: Path, content: bytes) -> None:
        handle, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise

    def _make_room(self, size: int) -> None:
        """Remove the least recently used entries until one of this size fits."""
        if self._used_bytes is None or self._used_bytes + size > self.limit_bytes:
            entries = self._entries()
            self._used_bytes = sum(entry.size for entry in entries)
            for entry in entries:
                if self._used_bytes + size <= self.limit_bytes:
                    break
                with suppress(FileNotFoundError):  # another process was faster
                    entry.path.unlink()
                self._used_bytes -= entry.size
        self._used_bytes += size

    def _entries(self) -> list[_Entry]:
        """Return all entries, the least recently used first; what a writer left unfinished is removed."""
        assert self.directory is not None
        with os.scandir(self.directory) as files:
            found = [_Entry.of(file) for file in files if _ENTRY.fullmatch(file.name)]
        with os.scandir(self.directory) as files:
            unfinished = [_Entry.of(file) for file in files if file.name.startswith(_UNFINISHED)]
        for entry in unfinished:
            if entry is not None and entry.used_ns < time.time_ns() - _ABANDONED_S * 10**9:
                with suppress(FileNotFoundError):
                    entry.path.unlink()
        return sorted(entry for entry in found if entry is not None)


@dataclass(frozen=True, order=True)
class _Entry:
    """A file of the cache, in the order in which they leave."""

    used_ns: int
    size: int
    path: Path

    @staticmethod
    def of(file: os.DirEntry[str]) -> _Entry | None:
        """Return what is known of a file; None if it has just been removed."""
        try:
            state = file.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        return _Entry(state.st_mtime_ns, state.st_size, Path(file.path))


def open_cache() -> KernelCache:
    """Return the cache that the user's settings name; where it is off or cannot be used, one that keeps nothing."""
    return KernelCache(config.kernel_cache_directory(), config.kernel_cache_bytes())


def _header(key: str, payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key.encode() + payload).digest()


def _is_private(directory: Path) -> bool:
    """Return whether this directory, made if need be, is ours and nobody else may write to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = directory.stat()
    except OSError:
        return False
    return state.st_uid == os.geteuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
