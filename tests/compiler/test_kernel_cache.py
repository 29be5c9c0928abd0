"""The cache of object code: bounded, verified, shared without a lock, and never an error."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.compiler import kernel_cache
from turbo_tvm.compiler.kernel_cache import KernelCache, open_cache

LIMIT = 1 << 20
HEADER_BYTES = 48


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def path_of(cache: KernelCache, number: int) -> Path:
    assert cache.directory is not None
    return cache.directory / f"{key(number)}.o"


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels", LIMIT)


class TestEntries:
    def test_what_was_put_is_found_again_by_another_process_too(self, cache):
        cache.put(key(1), b"code")
        assert cache.get(key(1)) == KernelCache(cache.directory, LIMIT).get(key(1)) == b"code"

    def test_nothing_is_found_under_another_key(self, cache):
        cache.put(key(1), b"code")
        assert cache.get(key(2)) is None

    def test_an_entry_can_be_empty(self, cache):
        cache.put(key(1), b"")
        assert cache.get(key(1)) == b""

    def test_the_last_one_put_counts(self, cache):
        cache.put(key(1), b"old")
        cache.put(key(1), b"new")
        assert cache.get(key(1)) == b"new"
        assert len(files_in(cache.directory)) == 1

    def test_directory_and_entries_are_for_the_user_alone(self, cache):
        cache.put(key(1), b"code")
        assert cache.directory.stat().st_mode & 0o777 == 0o700
        assert path_of(cache, 1).stat().st_mode & 0o077 == 0

    def test_a_cache_that_is_off_keeps_nothing(self):
        off = KernelCache(None, LIMIT)
        off.put(key(1), b"code")
        assert off.get(key(1)) is None


class TestVerification:
    @pytest.mark.parametrize("length", [0, 1, 15, 16, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 3])
    def test_a_truncated_entry_is_removed(self, cache, length):
        cache.put(key(1), b"code")
        path = path_of(cache, 1)
        path.write_bytes(path.read_bytes()[:length])
        assert cache.get(key(1)) is None
        assert not path.exists()

    @settings(deadline=None)
    @given(position=st.integers(0, HEADER_BYTES + 3), change=st.integers(1, 255))
    def test_a_changed_byte_is_noticed_wherever_it_is(self, position, change):
        with tempfile.TemporaryDirectory() as directory:
            cache = KernelCache(Path(directory), LIMIT)
            cache.put(key(1), b"code")
            content = bytearray(path_of(cache, 1).read_bytes())
            content[position] ^= change
            path_of(cache, 1).write_bytes(content)
            assert cache.get(key(1)) is None
            assert files_in(cache.directory) == []

    def test_an_entry_under_the_key_of_another_is_removed(self, cache):
        cache.put(key(1), b"code")
        path_of(cache, 1).rename(path_of(cache, 2))
        assert cache.get(key(2)) is None
        assert not path_of(cache, 2).exists()

    def test_what_was_damaged_can_be_put_again(self, cache):
        cache.put(key(1), b"code")
        path_of(cache, 1).write_bytes(b"something else")
        assert cache.get(key(1)) is None
        cache.put(key(1), b"code")
        assert cache.get(key(1)) == b"code"


class TestBound:
    @settings(deadline=None, max_examples=60)
    @given(
        limit=st.integers(0, 400),
        steps=st.lists(st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 5), st.integers(0, 200)), max_size=25),
        processes=st.integers(1, 3),
    )
    def test_entries_never_take_more_and_the_last_used_stay(self, limit, steps, processes):
        with tempfile.TemporaryDirectory() as directory:
            caches = [KernelCache(Path(directory), limit) for _ in range(processes)]
            expected: dict[int, int] = {}  # size by entry, the least recently used first
            for number, (action, entry, size) in enumerate(steps):
                cache = caches[0] if processes == 1 else KernelCache(Path(directory), limit)
                if action == "put":
                    cache.put(key(entry), bytes(size))
                    _put(expected, entry, HEADER_BYTES + size, limit)
                elif cache.get(key(entry)) is not None:
                    expected[entry] = expected.pop(entry)
                if path_of(cache, entry).exists():
                    os.utime(path_of(cache, entry), ns=(number, number))
                assert bytes_in(Path(directory)) <= limit
                assert files_in(Path(directory)) == sorted(path_of(cache, e).name for e in expected)

    def test_what_was_not_used_for_the_longest_time_leaves(self, tmp_path):
        cache = KernelCache(tmp_path, 3 * (HEADER_BYTES + 100))
        for number in range(3):
            cache.put(key(number), bytes(100))
            os.utime(path_of(cache, number), ns=(number, number))
        cache.get(key(0))  # now the one used last
        cache.put(key(3), bytes(100))
        assert [cache.get(key(number)) is not None for number in range(4)] == [True, False, True, True]

    def test_what_is_larger_than_the_cache_drives_nothing_out(self, tmp_path):
        cache = KernelCache(tmp_path, 200)
        cache.put(key(1), bytes(100))
        cache.put(key(2), bytes(200))
        assert [cache.get(key(1)), cache.get(key(2))] == [bytes(100), None]

    def test_files_of_others_are_not_touched(self, tmp_path):
        mine = [tmp_path / "notes.txt", tmp_path / "kernel.o", tmp_path / f"{key(1)}.txt"]
        for path in mine:
            path.write_bytes(bytes(1000))
        KernelCache(tmp_path, 200).put(key(1), bytes(100))
        assert all(path.stat().st_size == 1000 for path in mine)

    def test_what_a_writer_left_an_hour_ago_is_removed(self, tmp_path):
        old, new = tmp_path / "unfinished-old", tmp_path / "unfinished-new"
        for path in (old, new):
            path.write_bytes(bytes(10))
        os.utime(old, (time.time() - 3700,) * 2)
        KernelCache(tmp_path, LIMIT).put(key(1), b"code")
        assert not old.exists() and new.exists()

    def test_an_entry_that_another_process_removes_first_counts_as_removed(self, tmp_path, monkeypatch):
        cache = KernelCache(tmp_path, HEADER_BYTES + 100)
        cache.put(key(1), bytes(100))
        unlink = Path.unlink

        def late(path: Path) -> None:
            unlink(path)
            unlink(path)  # raises FileNotFoundError

        monkeypatch.setattr(Path, "unlink", late)
        cache.put(key(2), bytes(100))
        assert [cache.get(key(1)), cache.get(key(2))] == [None, bytes(100)]


def _put(entries: dict[int, int], entry: int, size: int, limit: int) -> None:
    """What `KernelCache.put` does to the entries, the least recently used of them first."""
    if size > limit:
        return
    while sum(entries.values()) + size > limit:
        entries.pop(next(iter(entries)))
    entries.pop(entry, None)
    entries[entry] = size


class TestDirectoriesThatAreNotUsed:
    def unused(self, directory: Path) -> bool:
        cache = KernelCache(directory, LIMIT)
        cache.put(key(1), b"code")
        return cache.get(key(1)) is None and not list(directory.glob("*.o"))

    @pytest.mark.parametrize("mode", [0o777, 0o707, 0o770, 0o720])
    def test_one_that_others_may_write_to(self, tmp_path, mode):
        tmp_path.chmod(mode)
        assert self.unused(tmp_path)

    def test_one_of_another_user(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
        assert self.unused(tmp_path)

    def test_one_that_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        assert self.unused(tmp_path / "file")
        assert self.unused(tmp_path / "file" / "kernels")

    def test_one_that_cannot_be_made(self, tmp_path, monkeypatch):
        def refuse(*_args, **_options):
            raise PermissionError(errno.EACCES, "read-only")

        monkeypatch.setattr(Path, "mkdir", refuse)
        assert self.unused(tmp_path / "kernels")

    def test_one_that_was_removed_meanwhile(self, cache):
        cache.directory.rmdir()
        cache.put(key(1), b"code")
        assert cache.get(key(1)) is None


class TestFailures:
    def fail(self, *_args, **_options):
        raise OSError(errno.ENOSPC, "no space left on device")

    @pytest.mark.parametrize("name", ["os.replace", "os.fdopen", "tempfile.mkstemp", "os.scandir"])
    def test_a_full_disk_is_no_error_and_leaves_nothing(self, cache, monkeypatch, name):
        with monkeypatch.context() as patch:
            patch.setattr(f"{kernel_cache.__name__}.{name}", self.fail)
            cache.put(key(1), b"code")
        assert cache.get(key(1)) is None
        assert files_in(cache.directory) == []

    def test_a_disk_that_fills_while_an_entry_is_written(self, cache, monkeypatch):
        class FullDisk:
            def __init__(self, handle: int, _mode: str):
                self.handle = handle

            def __enter__(self):
                return self

            def __exit__(self, *_):
                os.close(self.handle)

            def write(self, content: bytes) -> None:
                os.write(self.handle, content[:10])
                raise OSError(errno.ENOSPC, "no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(f"{kernel_cache.__name__}.os.fdopen", FullDisk)
            cache.put(key(1), b"code")
        assert files_in(cache.directory) == []

    def test_an_interrupt_leaves_nothing_and_is_not_swallowed(self, cache, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(f"{kernel_cache.__name__}.os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.put(key(1), b"code")
        assert files_in(cache.directory) == []

    def test_an_entry_whose_time_cannot_be_set_is_used_all_the_same(self, cache, monkeypatch):
        cache.put(key(1), b"code")
        monkeypatch.setattr(f"{kernel_cache.__name__}.os.utime", self.fail)
        assert cache.get(key(1)) == b"code"

    def test_an_entry_that_cannot_be_read_counts_as_absent(self, cache):
        path_of(cache, 1).mkdir()
        assert cache.get(key(1)) is None


WRITER = """
import hashlib, random, sys
from pathlib import Path
from turbo_tvm.compiler.kernel_cache import KernelCache

chance = random.Random(int(sys.argv[2]))
for _ in range(40):
    cache = KernelCache(Path(sys.argv[1]), 20_000)
    for _ in range(5):
        number = chance.randrange(12)
        key = hashlib.sha256(str(number).encode()).hexdigest()
        found = cache.get(key)
        assert found in (None, *(bytes([number, version]) * 2000 for version in range(4))), "a torn entry"
        cache.put(key, bytes([number, chance.randrange(4)]) * 2000)
"""


def test_processes_that_write_at_once_neither_fail_nor_see_half_an_entry(tmp_path):
    directory = tmp_path / "kernels"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(directory), str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(4)
    ]
    complaints = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, complaints
    KernelCache(directory, 20_000).put(key(99), bytes(1000))
    assert bytes_in(directory) <= 20_000


class TestSettings:
    def test_the_directory_that_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", str(tmp_path / "here"))
        assert open_cache().directory == tmp_path / "here"

    def test_off(self, monkeypatch):
        monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", "0")
        assert open_cache().directory is None

    def test_the_size(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", str(tmp_path))
        monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE_MB", "3")
        assert open_cache().limit_bytes == 3 << 20
