"""The kernels that reach a machine's limits are what they claim to be."""

from __future__ import annotations

import platform
import re

import numpy as np
import pytest
import tvm

from turbo_tvm.compiler import targets
from turbo_tvm.profiling import limit_kernels, limit_measurement
from turbo_tvm.schedules.cpu.tiles import AVX2, AVX512, NEON, cpu_tiles

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 code")


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
