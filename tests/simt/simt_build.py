"""Compiles the executor, and kernels for it, to shared libraries; what was compiled once on this machine is kept.

Libraries lie in a folder of the user's in the system's folder for temporary files, under the sum of all that they are
made of: sources, headers, flags, the compiler, TVM and the CPU. Processes that want one at the same time compile it
once; what is unfinished is never seen. What no run has used for a month is removed.

The headers that every kernel includes are compiled once, too: they cost more than most kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import tvm
import tvm_ffi
from filelock import FileLock
from tvm.support import cc

HERE = Path(__file__).parent
_LANGUAGE = ("-std=gnu++17", "-fPIC", "-w", "-pipe")
_KERNEL_FLAGS = (
    "-O1",
    "-fsanitize=thread",
    "-fno-strict-aliasing",
    "-fno-threadsafe-statics",
    "-fno-tree-sra",
    "-fno-tree-vectorize",
    "-fno-store-merging",
    "-ffp-contract=off",
    "-march=native",
)
_EXECUTOR_FLAGS = ("-O2", "-U_FORTIFY_SOURCE")
_DEVICE_FLAGS = ("-O0", "-U_FORTIFY_SOURCE")  # it copies and calls: nothing to optimise
_UNUSED_DAYS = 30


def kernels(source: str) -> Path:
    """Return a library of a C++ source, which is compiled as kernels are: every access calls the executor."""
    flags = [*_KERNEL_FLAGS, "-I", str(HERE / "include")]

    def make(scratch: Path, library: Path) -> None:
        path, built = scratch / "kernels.cc", scratch / "kernels.o"
        path.write_text(source)
        _run([*_compiler(), *flags, "-include", str(_headers()), "-c", str(path), "-o", str(built)])
        _run([*_compiler(), "-shared", str(built), "-o", str(library)])  # the executor is the sanitizer's library

    return _kept("kernels", ".so", (source, flags, _header_texts()), make)


def executor() -> Path:
    """Return the library of the executor and of TVM's device that runs kernels in it."""
    roots = [HERE, Path(tvm.__file__).parent / "include", Path(tvm_ffi.__file__).parent / "include"]
    includes = [flag for root in roots for flag in ("-I", str(root))]
    parts = {"executor.cc": _EXECUTOR_FLAGS, "tvm_device.cc": _DEVICE_FLAGS}
    texts = [(HERE / name).read_text() for name in parts]

    def make(scratch: Path, library: Path) -> None:
        objects = [str(scratch / f"{name}.o") for name in parts]
        for (name, flags), built in zip(parts.items(), objects, strict=True):
            _run([*_compiler(), *flags, *includes, "-c", str(HERE / name), "-o", built])
        _run([*_compiler(), "-shared", *objects, "-o", str(library)])

    return _kept("executor", ".so", (texts, parts, includes, _header_texts(), tvm.__version__), make)


@lru_cache(maxsize=1)
def _headers() -> Path:
    """Return a header that includes all of ours, beside what the compiler made of it."""

    def make(scratch: Path, folder: Path) -> None:
        folder.mkdir()
        header, compiled = folder / "kernel.h", folder / "kernel.h.gch"
        header.write_text("".join(f'#include "{path}"\n' for path in _header_texts()))
        flags = [*_KERNEL_FLAGS, "-I", str(HERE / "include")]
        _run([*_compiler(), *flags, "-x", "c++-header", str(header), "-o", str(compiled)])

    return _kept("headers", "", (_KERNEL_FLAGS, _header_texts()), make) / "kernel.h"


@lru_cache(maxsize=1)
def _header_texts() -> Mapping[str, str]:
    """Return what kernels include, by path."""
    return {str(path): path.read_text() for path in sorted((HERE / "include").iterdir())}


def _kept(name: str, suffix: str, parts: Sequence[object], make: Callable[[Path, Path], None]) -> Path:
    """Return the file or folder that is made of these parts, by make(scratch folder, path) unless it is there."""
    digest = hashlib.sha256(repr((parts, _LANGUAGE, _machine())).encode()).hexdigest()[:24]
    place = _folder() / f"{name}_{digest}{suffix}"
    if not place.exists():
        with FileLock(_folder() / f"{name}_{digest[0]}.lock"):  # not one per file: they stay
            if not place.exists():
                with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
                    unfinished = Path(scratch) / f"unfinished{suffix}"
                    make(Path(scratch), unfinished)
                    unfinished.rename(place)
    with contextlib.suppress(FileNotFoundError):
        os.utime(place)  # it is in use
    return place


@lru_cache(maxsize=1)
def _machine() -> tuple[str, ...]:
    """Return what code depends on beside its source: the compiler, and the CPU that it compiles for."""
    version = subprocess.run([cc.get_cc(), "--version"], capture_output=True, text=True, check=True).stdout
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return version, next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return version, platform.platform()


@lru_cache(maxsize=1)
def _folder() -> Path:
    """Return where libraries are kept, without what has not been used for long."""
    folder = Path(tempfile.gettempdir()) / f"turbo_tvm_simt_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: code is loaded from it, so remove it")
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process removes it, too
            if path.stat().st_mtime < time.time() - _UNUSED_DAYS * 86_400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def _compiler() -> list[str]:
    return [cc.get_cc(), *_LANGUAGE]


def _run(command: Sequence[str]) -> None:
    """Run a compiler. Raises RuntimeError with what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[:4000]}")
