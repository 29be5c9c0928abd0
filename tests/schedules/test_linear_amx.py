"""The matrix kernel in AMX tiles: its results with the instructions emulated, and its machine code for CPUs with AMX.

The schedule is the one that is compiled for such a CPU, with LLVM's intrinsics replaced by functions of the same kind
(`amx_emulation.cc`), which also judge how they are used: shapes, order, what is read, what is left configured.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tvm.support import cc

from turbo_tvm.schedules import amx, linear_amx, tiles, weights
from turbo_tvm.schedules.rows import RowFormat

EPS = 1e-5
FP32, BF16 = "float32", "uint16"
HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
GELU_BF16 = 8e-5  # what `gelu_bf16` may be off, times max(1, |x|)
GEOMETRY = tiles.AMX
R = GEOMETRY.row_tile
EMULATED = amx.LLVM.replace("llvm.x86.", "amx_emulated_").replace(" immarg", "")

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(FP32)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The emulated intrinsics, where code that TVM compiles in this process finds them; returns their report."""
    library = tmp_path_factory.mktemp("amx") / "amx_emulation.so"
    source = Path(__file__).with_name("amx_emulation.cc")
    subprocess.run([cc.get_cc(), "-O2", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def report():
        counts, text = (ctypes.c_int64 * 4)(), ctypes.create_string_buffer(100)
        loaded.amx_report(counts, text, ctypes.c_int64(100))
        return text.value.decode(), *counts

    return report


@functools.cache
def kernel_of(**options):
    return linear_amx.linear(GEOMETRY, instructions=EMULATED, **options)


@functools.cache
def packing_of(k, n):
    return weights.pack_weight(GEOMETRY, k=k, n=n, pairs=True)


@pytest.fixture
def multiply(run_kernel, emulation):
    """`multiply(x, w, bias, *others, width, **options)`: the kernel's output; fails if tiles were misused."""

    def multiply(x, w, bias, *others, width, out=FP32, before=None, **options):
        (n, k), t = w.shape, len(x)
        panels, steps = GEOMETRY.panels(n), -(-k // 32)
        packed = run_kernel(packing_of(k, n), [w], (panels, k // 2, GEOMETRY.col_tile), dtype="int32")
        padded = np.zeros(panels * GEOMETRY.col_tile, FP32)
        padded[:n] = bias
        emulation()
        formats = {"x": RowFormat(x.shape[-1], BF16), "out": RowFormat(width, out)}
        kernel = kernel_of(k=k, n=n, **formats, **options)
        result = run_kernel(kernel, [x, packed, padded, *others], (t, R, width), dtype=out, out=before)
        fault, active, dots, x_bytes, weight_bytes = emulation()
        assert not fault and not active
        heights = [min(32, t * R - row) for row in range(0, t * R, 32)]
        assert dots == panels * steps * sum(4 if height > 16 else 2 for height in heights)
        assert x_bytes == (2 * ((t * R - 1) * x.shape[-1] + k) if t else 0), "read beyond k or the last row"
        assert weight_bytes == (packed.nbytes if t else 0)
        return result

    return multiply


@pytest.fixture
def check(multiply, stored, loaded):
    """`check(t, k, n, ...)`: the kernel on so many row tiles against float64, as in `test_linear.py`."""

    def check(t, k, n, activation=None, residual=False, norm=False, extra=FP32, out=FP32, wider=(0, 0, 0)):
        x = stored(draw(1, t, R, k), BF16, k + wider[0])
        extra_rows = stored(draw(2, t, R, n), extra, n + wider[1])
        w = loaded(stored(draw(3, n, k) / np.float32(math.sqrt(k)), BF16), k).astype(FP32)
        bias, gamma, beta = draw(4, n), draw(5, n), draw(6, n)
        others = [extra_rows] * residual + [gamma, beta] * norm
        options = {"activation": activation, "residual": residual, "norm_eps": EPS if norm else None}
        options["extra"] = RowFormat(n + wider[1], extra)
        got = loaded(multiply(x, w, bias, *others, width=n + wider[2], out=out, **options), n)

        products = loaded(x, k) @ w.T.astype("float64") + bias
        wanted = ACTIVATIONS[activation](products) + loaded(extra_rows, n) * residual
        bound = 1e-5 * math.sqrt(max(1, k / 100)) + 2e-5 * np.abs(wanted)
        if out == BF16:
            bound += HALF_ULP * np.abs(wanted)
            bound += 1.01 * GELU_BF16 * np.maximum(1, np.abs(products)) * (activation == "gelu")
        if norm:
            mean, deviation = wanted.mean(-1, keepdims=True), np.sqrt(wanted.var(-1, keepdims=True) + EPS)
            wanted = (wanted - mean) / deviation * gamma + beta
            if out == BF16:
                bound = 3 * bound.max(-1, keepdims=True) / deviation * np.abs(gamma) + HALF_ULP * np.abs(wanted)
            else:
                bound = 1e-5 * math.sqrt(max(1, k / 100)) + 2e-5 * np.abs(wanted)
        assert (np.abs(got - wanted) - bound).max() <= 0

    return check


# around a tile of 16 and of 32 rows, and around blocks of 192
@pytest.mark.parametrize("t", [*range(1, 18), 47, 48, 49, 57, 97])
def test_row_counts(check, t):
    check(t, 96, 96)
    check(t, 72, 40)


@pytest.mark.parametrize("k", [2, 16, 30, 32, 34, 62, 64, 66, 100, 126])
@pytest.mark.parametrize("t", [3, 7, 9])
def test_columns_of_x_that_do_not_fill_the_last_step(check, t, k):
    check(t, k, 64)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 100])
def test_columns_that_do_not_fill_the_last_panel(check, n):
    check(5, 70, n, residual=True)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(check, activation):
    check(5, 48, 36, activation=activation)


@pytest.mark.parametrize("n,residual,activation", [(96, True, None), (100, False, "gelu"), (7, True, "relu")])
def test_norm(check, n, residual, activation):
    check(9, 36, n, activation=activation, residual=residual, norm=True)


@pytest.mark.parametrize("n", [64, 70])
@pytest.mark.parametrize("wider", [(16, 0, 0), (0, 16, 0), (0, 0, 16), (2, 4, 6), (32, 32, 32)], ids=str)
def test_wide_rows(check, wider, n):
    check(5, 40, n, residual=True, norm=n == 70, wider=wider)


@pytest.mark.parametrize("extra", [FP32, BF16])
@pytest.mark.parametrize("out", [FP32, BF16])
@pytest.mark.parametrize("n", [32, 35])
def test_formats_of_residual_and_output(check, extra, out, n):
    check(7, 48, n, activation="gelu", residual=True, norm=n == 35, extra=extra, out=out)


def test_the_sizes_of_a_bert_base_layer(check):
    check(9, 768, 3072, activation="gelu", out=BF16, wider=(0, 0, 32))
    check(9, 3072, 768, residual=True, norm=True, extra=BF16, out=BF16, wider=(32, 0, 0))


@pytest.mark.parametrize("n", [32, 70])
def test_every_row_tile_is_computed_once(multiply, stored, n):
    """The residual is the output itself: what is computed twice is added twice. Whole numbers, so sums are exact."""
    rng = np.random.default_rng(0)
    w = rng.integers(-9, 10, (n, 4)).astype(FP32)
    for t in (*range(1, 20), *range(47, 51), *range(95, 99), 150):
        x = rng.integers(-9, 10, (t, R, 4)).astype(FP32)
        before = rng.integers(-9, 10, (t, R, n)).astype(FP32)
        rows = stored(x, BF16)
        after = multiply(rows, w, np.zeros(n), before, width=n, residual=True, before=before)
        np.testing.assert_array_equal(after, before + x @ w.T, f"{t} row tiles")


def test_no_row_is_none(multiply):
    w = np.zeros((8, 8), FP32)
    assert multiply(np.zeros((0, R, 8), BF16), w, np.zeros(8), width=8).size == 0


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit AMX"):
        linear_amx.linear(tiles.AVX2, k=8, n=8, x=RowFormat(8, BF16))


def test_the_same_parameters_as_without_amx():
    def names(**options):
        return [p.name for p in linear_amx.linear(GEOMETRY, k=8, n=32, x=RowFormat(8, BF16), **options).params]

    assert names() == ["source", "weight", "bias", "result"]
    assert names(residual=True, norm_eps=EPS)[3:6] == ["residual_rows", "gamma", "beta"]


@pytest.fixture(scope="module")
def tile_code(assembly):
    """`tile_code(k, n)`: the tile instructions of the kernel for a CPU with AMX, in order, and the whole text."""

    def get(k, n, mcpu="sapphirerapids"):
        kernel = linear_amx.linear(GEOMETRY, k=k, n=n, x=RowFormat(k, BF16), activation="gelu", norm_eps=EPS)
        text = assembly(kernel, {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu})
        return re.findall(r"\t(ldtilecfg|tile\w+|tdp\w+|call\w*)\t?(.*)", text), text

    return get


def operands(code, name):
    return [re.findall(r"%tmm(\d)", rest) for instruction, rest in code if instruction == name]


@pytest.mark.parametrize("mcpu", ["sapphirerapids", "graniterapids"])
def test_a_step_is_four_loads_and_four_products(tile_code, mcpu):
    steps = 768 // 32
    code, text = tile_code(768, 64, mcpu)
    loop = max(re.split(r"\n\.L\w+:", text), key=lambda block: block.count("tdpbf16ps"))
    assert loop.count("tdpbf16ps") == loop.count("tileloadd") > 0 == loop.count("tdpbf16ps") % 4
    assert loop.count("tdpbf16ps") in (4, 4 * steps)  # LLVM unrolls short loops
    wanted = {("6", "4", "0"), ("7", "4", "1"), ("6", "5", "2"), ("7", "5", "3")}
    assert {tuple(tiles_of) for tiles_of in operands(code, "tdpbf16ps")} == wanted
    assert "vdpbf16ps" not in text
    assert not re.search(r"\bturbo_\w+@", text), "a function that was not imported"


@pytest.mark.parametrize("k,passes", [(64, 1), (72, 2), (16, 1)])
def test_tiles_are_configured_first_and_released_last(tile_code, k, passes):
    code, _ = tile_code(k, 64)
    names = [name for name, _ in code if not name.startswith("call")]
    assert names.count("ldtilecfg") == 2 * passes  # with and without the lower half
    assert names.count("tilestored") == (4 + 2) * passes and names.count("tilezero") == 4 + 2
    assert names[0] == "ldtilecfg" and names[-1] == "tilerelease"
    held = False
    for name, _ in code:
        held = name == "ldtilecfg" or (held and name != "tilerelease")
        assert held or not name.startswith(("tilel", "tiles", "tilez", "tdp"))
        assert not (held and name.startswith("call")), "a call that may change the tiles"
