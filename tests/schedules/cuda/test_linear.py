"""The matrix kernel against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sized_operators as sized
from cuda_kernels import DTYPES, LENGTHS, ROWS, ULP, allowed, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cuda.linear import linear, space
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

COLUMNS = CUDA_TILES.col_tile
SIZES = tuple(zip(LENGTHS, reversed(LENGTHS), strict=True))  # k and n: each takes every length once

pytestmark = pytest.mark.xdist_group("cuda-linear")


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


ACTIVATIONS = {
    None: lambda x: x,
    "gelu": gelu,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}


def panels(weight: np.ndarray) -> np.ndarray:
    """(k, n) in the kernel's layout, (P, k, C), with zeros beyond n."""
    k, n = weight.shape
    count = CUDA_TILES.panels(n)
    padded = np.zeros((k, count * COLUMNS), weight.dtype)
    padded[:, :n] = weight
    return np.ascontiguousarray(padded.reshape(k, count, COLUMNS).transpose(1, 0, 2))


def draw(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
    return stored(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def operator(k, n, dtype, *, residual=False, **options):
    formats = {"x": Operand.rows(k, dtype), "out": Operand.rows(n, dtype)}
    return sized.linear(CUDA_TILES, k, n, residual=residual and Operand.rows(n, dtype), **formats | options)


def kernel(k, n, dtype, variants=(), **options):
    return linear(operator(k, n, dtype, **options), CUDA_TILES, variants)


def check(gpu, module, name, m, k, n, dtype, *, activation=None, residual=False, out=None, x_width=None, scale=1.0):
    x = draw(1, m, 1, x_width or k, dtype=dtype, scale=scale)
    weight = draw(2, k, n, dtype=dtype, scale=1 / math.sqrt(k))
    bias = np.zeros(CUDA_TILES.panels(n) * COLUMNS, np.float32)
    bias[:n] = draw(3, n)
    extra = draw(4, m, 1, n, dtype=dtype)
    out = out or dtype
    inputs = [x, panels(weight), bias, *([extra] if residual else [])]
    found = loaded(gpu.run(module, name, inputs, np.zeros((m, 1, n), out)))[:, 0]
    products = loaded(x)[:, 0, :k] @ loaded(weight) + bias[:n]
    want = ACTIVATIONS[activation](products) + (loaded(extra)[:, 0] if residual else 0)
    size = np.abs(loaded(x)[:, 0, :k]) @ np.abs(loaded(weight)) + np.abs(bias[:n]) + np.abs(want)
    error = 2e-7 * math.sqrt(k) * size + 5e-7 * np.maximum(1, np.abs(products))
    if activation == "gelu" and out == "uint16":
        error += 8e-5 * np.maximum(1, np.abs(products))  # a shorter polynomial is enough there
    assert (np.abs(found - want) <= allowed(want, out, error)).all()


@pytest.fixture(scope="module")
def kernels(gpu):
    """By dtype: products of all sizes, with everything fused."""
    made = {}

    def of(dtype):
        if dtype not in made:
            options = {"activation": "gelu", "residual": True}
            made[dtype] = gpu.build({f"linear_{k}x{n}": kernel(k, n, dtype, **options) for k, n in SIZES})
        return made[dtype]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_products_of_every_width_match_float64(gpu, kernels, dtype, k, n):
    with gpu.device.uncounted():
        for m in ROWS:
            check(gpu, kernels(dtype), f"linear_{k}x{n}", m, k, n, dtype, activation="gelu", residual=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(gpu, dtype, activation):
    module = gpu.build({"f": kernel(64, 128, dtype, activation=activation)})
    for scale in (1.0, 30.0, 1e-3):
        check(gpu, module, "f", 70, 64, 128, dtype, activation=activation, scale=scale)


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
@pytest.mark.parametrize("extra", [False, True])
def test_formats_and_wider_rows(gpu, dtype, extra):
    formats = {"x": Operand.rows(104, dtype), "out": Operand.rows(200)}
    module = gpu.build({"f": kernel(100, 200, dtype, residual=extra, **formats)})
    check(gpu, module, "f", 65, 100, 200, dtype, residual=extra, out="float32", x_width=104)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(gpu, dtype):
    module = gpu.build({"f": kernel(96, 256, dtype)})
    for m in (63, 64, 65, 127, 129, 300):
        check(gpu, module, "f", m, 96, 256, dtype)


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
def test_large_numbers_overflow_as_they_should(gpu, dtype):
    """fp32 sums, rounded once: 40 * 200 * 200 is beyond fp16, not beyond bf16."""
    x, weight = stored(np.full((3, 1, 40), 200.0), dtype), stored(np.full((40, 8), 200.0), dtype)
    module = gpu.build({"f": kernel(40, 8, dtype)})
    out = loaded(gpu.run(module, "f", [x, panels(weight), np.zeros(COLUMNS, np.float32)], np.zeros((3, 1, 8), dtype)))
    assert np.isinf(out).all() if dtype == "float16" else (np.abs(out / 1.6e6 - 1) < ULP[dtype]).all()


def test_in_place_of_the_residual(gpu):
    import tvm

    x, extra, weight = draw(1, 70, 1, 64), draw(4, 70, 1, 40), draw(2, 64, 40)
    module = gpu.build({"f": kernel(64, 40, "float32", residual=True)})
    arrays = (x, panels(weight), np.zeros(COLUMNS, np.float32), extra)
    tensors = [tvm.runtime.tensor(a, tvm.cuda(0)) for a in arrays]
    module["f"](*tensors, tensors[3])
    np.testing.assert_allclose(tensors[3].numpy()[:, 0], x[:, 0] @ weight + extra[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.05), ("float16", 0.12), ("uint16", 0.12)])
def test_shared_memory_has_few_bank_conflicts(gpu, dtype, share):
    module = gpu.build({"f": kernel(256, 256, dtype)})
    check(gpu, module, "f", 128, 256, 256, dtype)
    counts = gpu.counts()
    assert counts.bank_conflicts <= share * counts.shared_wavefronts
    assert counts.mma == (0 if dtype == "float32" else 128 * 256 * 256 // 16**3)


@pytest.mark.parametrize(("k", "dtype"), [(72, "float32"), (72, "float16"), (33, "float16")])
def test_extreme_settings(gpu, extremes, k, dtype):
    """The batch ends within a tile, k within a step; 33 columns have no wide accesses."""
    n, options = 130, {"activation": "relu", "residual": True}
    variants = extremes(space(operator(k, n, dtype, **options), CUDA_TILES))
    if k == 33:
        variants = variants[:2]  # what else there is does not depend on how x is read
    module = gpu.build({f"f_{i}": kernel(k, n, dtype, variants=(v,), **options) for i, v in enumerate(variants)})
    with gpu.device.uncounted():
        for i in range(len(variants)):
            check(gpu, module, f"f_{i}", 150, k, n, dtype, **options)


def test_settings_that_do_not_fit_a_block():
    too_much = {
        "shared memory": {"depth": 32},
        "registers": {"rows": 128, "warps_across": 2},
        "rows of a warp": {"warps_down": 4},
        "accesses of a thread": {"rows": 32, "depth": 8, "warps_across": 4},
    }
    for setting in too_much.values():
        with pytest.raises(ValueError, match="does not fit this kernel"):
            kernel(64, 128, "float32", variants=(Variant(tuple(setting.items())),))
