"""The cache of a machine's limits: what it holds, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import platform

import pytest

from turbo_tvm import config
from turbo_tvm.errors import CompileError
from turbo_tvm.profiling import limit_measurement, machine_limits
from turbo_tvm.profiling.roofline import MachineLimits

WORDS: list[str] = []
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 code")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    WORDS.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "turbo_tvm"


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements; each gives other figures."""
    made: list[MachineLimits] = []

    def measure(threads, cpu, version, *, step):
        made.append(MachineLimits(cpu, threads, version, 1e9 + len(made), None, 1e8, 2e8, None, 0))
        return made[-1]

    monkeypatch.setattr(limit_measurement, "measure", measure)
    return made


def limits(threads=1, **options):
    return machine_limits.machine_limits(threads, notice=WORDS.append, step=WORDS.append, **options)


def test_limits_are_measured_once_for_a_thread_count(measured):
    first = limits()
    assert limits() == first and len(measured) == 1
    assert limits(2).threads == 2 and len(measured) == 2
    assert limits() == first and len(measured) == 2
    assert not WORDS


def test_remeasure(measured, cache):
    limits()
    assert limits(remeasure=True) == limits() == measured[1]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", "\xff", '{"cpu": 1}'],
    ids=["empty", "cut", "list", "fields", "null", "x", "few"],
)
def test_a_broken_file_is_measured_again(measured, text):
    limits()
    machine_limits.cache_file(1).write_bytes(text.encode("latin1"))
    assert limits() == measured[1]
    assert "cannot be used" in WORDS[0] and "measuring again" in WORDS[0]
    assert limits() == measured[1] and len(WORDS) == 1


@pytest.mark.parametrize("change", [{"dram": 0}, {"dram": "x"}, {"fp32_flops": None}, {"dram": True}, {"threads": 3}])
def test_wrong_values_are_measured_again(measured, change):
    path, first = machine_limits.cache_file(1), limits()
    path.write_text(json.dumps(dataclasses.asdict(first) | change))
    assert limits() == measured[1] and len(WORDS) == 1


def test_another_cpu_or_tvm_is_measured(measured, monkeypatch):
    limits()
    monkeypatch.setattr(machine_limits, "tvm_version", lambda: "9")
    limits()
    monkeypatch.setattr(machine_limits, "cpu_name", lambda: "another")
    limits()
    assert len(measured) == 3


def test_another_format_is_measured(measured, monkeypatch):
    """Figures that meant something else are neither used nor complained about."""
    limits()
    monkeypatch.setattr(machine_limits, "_FORMAT", machine_limits._FORMAT + 1)
    assert limits() == measured[1] and len(measured) == 2
    assert not WORDS


def test_a_cache_that_cannot_be_written_is_said(measured, cache):
    cache.parent.write_text("a file in the directory's place")
    assert limits() == measured[0]
    assert "cannot be kept" in WORDS[0] and len(WORDS) == 1


def test_limits_of_a_busy_machine_are_not_kept(measured, monkeypatch, cache):
    busy = MachineLimits("c", 1, "1", 1e9, None, 1e8, 1e8, None, 0, cpu_share=0.52)
    monkeypatch.setattr(limit_measurement, "measure", lambda *_, **__: busy)
    assert limits() == busy
    assert WORDS == ["other programs took 48% of the CPUs: the limits are too low, and not kept"]
    assert not cache.exists()


def test_no_cache_directory(measured, monkeypatch):
    monkeypatch.setattr(config, "cache_directory", lambda: None)
    assert limits() == measured[0]
    assert WORDS == ["there is no cache directory: the measured limits are not kept"]


def test_a_process_without_compiler_says_so(monkeypatch):
    def none():
        raise CompileError("no compiler here")

    monkeypatch.setattr(config, "check_tvm_can_compile", none)
    with pytest.raises(CompileError, match="no compiler here"):
        limits()


@pytest.mark.parametrize(("value", "used"), [("/x", "/x/turbo_tvm"), ("relative", None), ("", None)])
def test_the_cache_directory(monkeypatch, value, used):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/some/where")
    assert str(config.cache_directory()) == (used or "/some/where/.cache/turbo_tvm")
