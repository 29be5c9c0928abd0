"""Loading a shared library from bytes, with a real one that TVM compiled."""

import errno
import os
import stat
import tempfile

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from turbo_tvm.errors import ArtifactError
from turbo_tvm.runtime.device import library
from turbo_tvm.runtime.device.library import load_library


def _adder(amount):
    @T.prim_func(s_tir=True)
    def add(a: T.Buffer((8,), "float32"), b: T.Buffer((8,), "float32")):
        T.func_attr({"global_symbol": "add"})
        for i in range(8):
            with T.sblock("add"):
                vi = T.axis.spatial(8, i)
                b[vi] = a[vi] + T.float32(amount)

    return add


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The bytes of two libraries whose `add` adds 1 and 100."""
    folder = tmp_path_factory.mktemp("libraries")
    found = []
    for amount in (1, 100):
        path = folder / f"add{amount}.so"
        built = tvm.compile(tvm.IRModule({"add": _adder(amount)}), target="llvm")
        built.export_library(str(path))
        found.append(path.read_bytes())
    return found


def _call(module):
    a, b = tvm.runtime.tensor(np.arange(8, dtype="float32")), tvm.runtime.tensor(np.zeros(8, "float32"))
    module["add"](a, b)
    return b.numpy() - a.numpy()


@pytest.fixture
def scratch(monkeypatch, tmp_path):
    """The directory for temporary files, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_loads_and_leaves_nothing(libraries, scratch):
    # The second is loaded while the first is in use: the loader must not take one for the other.
    modules = [load_library(data) for data in libraries]
    assert [set(_call(module)) for module in modules] == [{1.0}, {100.0}]
    assert not list(scratch.iterdir())


def test_only_this_user_can_enter(libraries, scratch, monkeypatch):
    seen = []
    load = library._load

    def look(tvm, path):
        seen.append(stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode))
        return load(tvm, path)

    monkeypatch.setattr(library, "_load", look)
    load_library(libraries[0])
    assert seen == [0o700]


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5])
def test_cut_short(libraries, scratch, keep):
    # The system's loader dies of SIGBUS on some of these.
    with pytest.raises(ArtifactError, match="not a whole shared library: compile the model again"):
        load_library(libraries[0][: int(keep * len(libraries[0]))])
    assert not list(scratch.iterdir())


def test_not_a_library(scratch):
    with pytest.raises(ArtifactError, match="not a whole shared library"):
        load_library(b"#!/bin/sh\n" * 100)


def test_for_another_machine(libraries, scratch):
    sparc = libraries[0][:18] + b"\x2b\x00" + libraries[0][20:]
    with pytest.raises(ArtifactError, match=r"cannot be loaded: .*compile the model again here"):
        load_library(sparc)
    assert not list(scratch.iterdir())


def test_no_temporary_directory(libraries, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ArtifactError, match=r"cannot unpack the artifact's code.*TMPDIR"):
        load_library(libraries[0])


def test_disk_full(libraries, scratch, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library, "open", lambda *_: Full(), raising=False)
    with pytest.raises(ArtifactError, match=r"No space left on device.*free some\s+space"):
        load_library(libraries[0])
    assert not list(scratch.iterdir())
