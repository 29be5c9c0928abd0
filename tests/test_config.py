"""Settings from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbo_tvm import config
from turbo_tvm.errors import TurboError


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "8")
    monkeypatch.delenv("TURBO_TVM_NUM_THREADS", raising=False)


def test_threads_asked_for_come_first(monkeypatch):
    monkeypatch.setenv("TURBO_TVM_NUM_THREADS", "3")
    assert (config.num_threads(5), config.num_threads()) == (5, 3)


def test_threads_are_one_per_physical_core(monkeypatch):
    cores = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(config, "_core_of", cores.get)
    assert config.num_threads() == config.physical_cores() == 2


def test_a_core_without_topology_is_itself():
    assert config._core_of(987654) == "987654"


@pytest.mark.parametrize("value", [0, -1, 9, 1.5, "two", "", [], True])
def test_threads_that_are_refused(value):
    with pytest.raises(TurboError, match="the number of threads must be a whole number from 1 to 8, not"):
        config.num_threads(value)


def test_a_variable_that_is_refused(monkeypatch):
    monkeypatch.setenv("TURBO_TVM_NUM_THREADS", "many")
    with pytest.raises(TurboError, match="not 'many'"):
        config.num_threads()


def test_dump_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("TURBO_TVM_DUMP_IR", raising=False)
    assert config.dump_ir_directory() is None
    monkeypatch.setenv("TURBO_TVM_DUMP_IR", str(tmp_path))
    assert config.dump_ir_directory() == Path(tmp_path)


@pytest.mark.parametrize("value", [None, "", "1"])
def test_kernels_are_kept_where_the_user_keeps_caches(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TURBO_TVM_KERNEL_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", value)
    assert config.kernel_cache_directory() == tmp_path / "turbo_tvm" / "kernels"


def test_kernels_are_kept_elsewhere_or_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", str(tmp_path))
    assert config.kernel_cache_directory() == tmp_path
    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE", "0")
    assert config.kernel_cache_directory() is None


def test_without_a_home_no_kernels_are_kept(monkeypatch):
    monkeypatch.delenv("TURBO_TVM_KERNEL_CACHE", raising=False)
    monkeypatch.setattr(config, "cache_directory", lambda: None)
    assert config.kernel_cache_directory() is None


def test_how_many_megabytes_of_kernels_are_kept(monkeypatch):
    monkeypatch.delenv("TURBO_TVM_KERNEL_CACHE_MB", raising=False)
    assert config.kernel_cache_bytes() == 512 << 20
    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE_MB", "7")
    assert config.kernel_cache_bytes() == 7 << 20


@pytest.mark.parametrize("value", ["-1", "1.5", "many", "1e3", "\u0663"])
def test_a_size_of_the_kernel_cache_that_is_refused(monkeypatch, value):
    monkeypatch.setenv("TURBO_TVM_KERNEL_CACHE_MB", value)
    with pytest.raises(TurboError, match="TURBO_TVM_KERNEL_CACHE_MB must be a whole number of megabytes, not"):
        config.kernel_cache_bytes()


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    monkeypatch.delenv("TVM_BIND_THREADS", raising=False)
    config.let_tvm_use_every_core()
    assert (os.environ["TVM_NUM_THREADS"], os.environ["TVM_BIND_THREADS"]) == ("3", "0")


LIGHT = """
import sys
import turbo_tvm
turbo_tvm.load
assert "tvm" in sys.modules and "torch" not in sys.modules
import torch
try:
    turbo_tvm.compile
except turbo_tvm.CompileError as error:
    print(error)
"""


def test_load_imports_tvm_without_compiler_and_torch_and_compile_says_so():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert "import torch before turbo_tvm.load" in done.stdout


def test_load_leaves_a_process_with_torch_able_to_compile():
    code = "import torch, turbo_tvm; turbo_tvm.load; turbo_tvm.compile"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_is_as_before():
    code = "import os, turbo_tvm; turbo_tvm.load; assert 'TVM_USE_RUNTIME_LIB' not in os.environ"
    subprocess.run([sys.executable, "-c", code], check=True)
