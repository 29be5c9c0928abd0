"""The machine's limits: the kernels are what they claim to be, and the cache holds, breaks and is refused."""

from __future__ import annotations

import dataclasses
import json
import platform
import re

import numpy as np
import pytest
import tvm

from turbo_tvm import config
from turbo_tvm.compiler import targets
from turbo_tvm.errors import ArtifactError, CompileError
from turbo_tvm.profiling import limit_kernels, limit_measurement, machine_limits
from turbo_tvm.profiling.roofline import MachineLimits
from turbo_tvm.schedules.cpu.tiles import AVX2, AVX512, NEON, cpu_tiles

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


def code(cpu: str) -> str:
    target = targets.resolve(cpu)
    amx = cpu == "cpu:sapphirerapids"
    module = limit_measurement.module(cpu_tiles(target), amx or cpu == "cpu:znver4", amx)
    return tvm.compile(module, target=target).mod.inspect_source("asm")


def innermost(text: str, name: str) -> str:
    """The block, between two labels, with the most of these instructions."""
    return max(re.split(r"^\.?\w+:.*$", text, flags=re.M), key=lambda block: block.count(name))


@x86_only
@pytest.mark.parametrize(
    ("cpu", "register", "count"),
    [("cpu:x86-64-v3", "ymm", 12), ("cpu:x86-64-v4", "zmm", 24), ("cpu:znver4", "zmm", 24)],
)
def test_the_loop_is_fused_multiply_adds_in_registers(cpu, register, count):
    text = code(cpu)
    for name in ["vfmadd", *(["vdpbf16ps"] if cpu == "cpu:znver4" else [])]:
        inner = innermost(text, name)
        found = re.findall(rf"\s{name}\w*\s+(.*)", inner)
        assert len(found) >= count and len(found) % count == 0
        assert all(line.count(register) == 3 and "(" not in line and "[" not in line for line in found)
        assert "call" not in inner


@x86_only
def test_the_loop_of_amx_is_products_on_four_tiles():
    text = code("cpu:sapphirerapids")
    inner = innermost(text, "tdpbf16ps")
    found = re.findall(r"\stdpbf16ps\s+(.*)", inner)
    pairs = [("tmm6", "tmm4"), ("tmm7", "tmm4"), ("tmm6", "tmm5"), ("tmm7", "tmm5")]
    assert len(found) % 4 == 0
    assert found == [f"%{b}, %{a}, %tmm{c}" for c, (b, a) in enumerate(pairs)] * (len(found) // 4)
    assert not re.search("call|tileload|tilestore", inner)
    assert [len(re.findall(rf"\s{name}\s", text)) for name in ("ldtilecfg", "tilerelease")] == [1, 1]


def test_sums_fill_the_registers_of_the_matrix_kernel():
    assert [limit_kernels.accumulators(tiles) for tiles in (AVX512, NEON, AVX2)] == [24, 24, 12]


def test_multiply_adds_compute_what_they_say():
    target = targets.resolve("cpu")
    tiles = cpu_tiles(target)
    kernel = tvm.compile(limit_measurement.module(tiles, False), target=target)["multiply_add"]
    start = np.arange(limit_kernels.accumulators(tiles) * tiles.lanes, dtype=np.float32).reshape(-1, tiles.lanes)
    factors = np.stack([np.full(tiles.lanes, 0.5), np.full(tiles.lanes, 2.0)]).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros((2, tiles.lanes), np.float32))
    kernel(tvm.runtime.tensor(start), tvm.runtime.tensor(factors), out, 3)
    wanted = (((start * 0.5 + 2) * 0.5 + 2) * 0.5 + 2).sum(0)
    np.testing.assert_allclose(out.numpy(), np.stack([wanted, wanted]), rtol=1e-5)


def test_products_in_tiles_compute_what_they_say():
    target = targets.resolve("cpu")
    if not limit_measurement.amx_granted(target):
        pytest.skip("no AMX here")
    kernel = tvm.compile(limit_measurement.module(cpu_tiles(target), True, True), target=target)["dot_amx"]
    rng = np.random.default_rng(0)
    start = rng.integers(-9, 9, (64, 16)).astype(np.float32)
    factors = rng.integers(-4, 4, (4, 16, 32)).astype(np.float32)
    pairs = (factors.view(np.uint32) >> 16).astype(np.uint16).view(np.int32).reshape(64, 16)
    out = tvm.runtime.tensor(np.zeros((2, 16), np.float32))
    kernel(tvm.runtime.tensor(start), tvm.runtime.tensor(pairs), out, 3)
    weights = factors[2:].reshape(2, 16, 16, 2).swapaxes(2, 3).reshape(2, 32, 16)
    products = factors[:2, None] @ weights[None]
    wanted = start.sum(0) + 3 * products.sum((0, 1, 2))
    np.testing.assert_array_equal(out.numpy(), np.stack([wanted, wanted]))


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_reading_reads_everything(tasks):
    target = targets.resolve("cpu")
    tiles = cpu_tiles(target)
    kernel = tvm.compile(limit_measurement.module(tiles, False), target=target)["read"]
    data = np.random.default_rng(0).integers(0, 9, (12, limit_kernels.block_floats(tiles))).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros((tasks, tiles.lanes), np.float32))
    kernel(tvm.runtime.tensor(data), out, 2)
    np.testing.assert_array_equal(out.numpy().sum(1), 2 * data.reshape(tasks, -1).sum(1))


def test_a_short_measurement_gives_limits():
    made = limit_measurement.measure(1, "cpu", "1", seconds=0.005, dram_bytes=1 << 20, step=WORDS.append)
    assert (made.cpu, made.threads, made.tvm_version) == ("cpu", 1, "1")
    values = [made.fp32_flops, made.bf16_flops, made.dram, made.dram_one_thread, made.cache]
    assert all(value is None or value > 0 for value in values) and made.fp32_flops
    assert WORDS[-1] == "measuring memory"


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


def test_the_best_call_is_kept():
    calls = []
    found = limit_measurement.best(lambda rounds: calls.append(rounds) or sum(range(rounds)), 0.0, 1000)
    assert len(calls) >= 3 and calls[0] == 1000 and calls[-1] == calls[-2] == calls[-3]
    assert found.seconds > 0 and found.cpus >= 0


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


def test_caches(tmp_path):
    for number, row in enumerate([("Data", "1", "48K"), ("Unified", "2", "1024K"), ("Unified", "3", "32768K")]):
        (tmp_path / f"index{number}").mkdir()
        for name, value in zip(("type", "level", "size"), row, strict=True):
            (tmp_path / f"index{number}" / name).write_text(value + "\n")
    assert limit_measurement.caches(tmp_path) == limit_measurement.Caches(1 << 20, 32 << 20)
    (tmp_path / "index2" / "size").write_text("large")
    assert limit_measurement.caches(tmp_path).last == 0
    assert limit_measurement.caches(tmp_path / "none") == limit_measurement.Caches(0, 0)


@pytest.mark.parametrize(("value", "used"), [("/x", "/x/turbo_tvm"), ("relative", None), ("", None)])
def test_the_cache_directory(monkeypatch, value, used):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/some/where")
    assert str(config.cache_directory()) == (used or "/some/where/.cache/turbo_tvm")
