"""Measuring a machine's limits: by which instructions, and how."""

from __future__ import annotations

import platform

import pytest

from turbo_tvm.compiler import targets
from turbo_tvm.errors import ArtifactError
from turbo_tvm.profiling import limit_measurement

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 code")


def test_a_short_measurement_gives_limits():
    said: list[str] = []
    made = limit_measurement.measure(1, "cpu", "1", seconds=0.005, dram_bytes=1 << 20, step=said.append)
    assert (made.cpu, made.threads, made.tvm_version) == ("cpu", 1, "1")
    values = [made.fp32_flops, made.bf16_flops, made.dram, made.dram_one_thread, made.cache]
    assert all(value is None or value > 0 for value in values) and made.fp32_flops
    assert said[-1] == "measuring memory"


@x86_only
@pytest.mark.parametrize(("refused", "granted"), [(False, True), (True, False)])
def test_tiles_are_asked_for(monkeypatch, refused, granted):
    asked = []

    def request(spec):
        asked.append(spec.name)
        if refused:
            raise ArtifactError("refused")

    monkeypatch.setattr(limit_measurement, "request_amx", request)
    assert not limit_measurement.amx_granted(targets.resolve("cpu:znver4")) and not asked
    assert limit_measurement.amx_granted(targets.resolve("cpu:sapphirerapids")) == granted and asked


def test_without_the_permission_no_tile_is_used(monkeypatch):
    def refuse(spec):
        raise ArtifactError("refused")

    monkeypatch.setattr(limit_measurement, "request_amx", refuse)
    bench = limit_measurement._Bench(1, 0.0)
    assert not bench.has_amx and "tdpbf16ps" not in bench.kernels.mod.inspect_source("asm")
    assert (bench.bf16() is not None) == bench.has_bf16


@pytest.mark.parametrize(
    ("has_amx", "has_bf16", "wanted"),
    [(True, True, [("dot_amx", 64.0)]), (False, True, [("dot_bf16", 4.0)]), (False, False, [])],
)
def test_the_limit_of_bf16_is_that_of_the_best_instruction(monkeypatch, has_amx, has_bf16, wanted):
    """FLOPs for each update of an accumulator: 32 or 2 multiply-adds."""
    used = []
    monkeypatch.setattr(limit_measurement._Bench, "_arithmetic", lambda self, name, *_: used.append(name) or 1.0)
    bench = object.__new__(limit_measurement._Bench)
    bench.has_amx, bench.has_bf16 = has_amx, has_bf16
    flops = bench.bf16()
    assert [(name, flops) for name in used] == wanted and (flops is None) == (not wanted)


def test_the_best_call_is_kept():
    calls = []
    found = limit_measurement.best(lambda rounds: calls.append(rounds) or sum(range(rounds)), 0.0, 1000)
    assert len(calls) >= 3 and calls[0] == 1000 and calls[-1] == calls[-2] == calls[-3]
    assert found.seconds > 0 and found.cpus >= 0


def test_caches(tmp_path):
    for number, row in enumerate([("Data", "1", "48K"), ("Unified", "2", "1024K"), ("Unified", "3", "32768K")]):
        (tmp_path / f"index{number}").mkdir()
        for name, value in zip(("type", "level", "size"), row, strict=True):
            (tmp_path / f"index{number}" / name).write_text(value + "\n")
    assert limit_measurement.caches(tmp_path) == limit_measurement.Caches(1 << 20, 32 << 20)
    (tmp_path / "index2" / "size").write_text("large")
    assert limit_measurement.caches(tmp_path).last == 0
    assert limit_measurement.caches(tmp_path / "none") == limit_measurement.Caches(0, 0)
