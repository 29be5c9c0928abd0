"""Softmax against float64, and against TVM's own schedule."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
from cuda_kernels import DTYPES, LENGTHS, ROWS, allowed, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cuda import softmax
from turbo_tvm.schedules.cuda.reduction import row_form, vector_width
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

rows = Operand.rows

pytestmark = pytest.mark.xdist_group("cuda-softmax")


def kernel(n, *, x=None, out=None, **how):
    return softmax.softmax(sized.softmax(CUDA_TILES, n, x=x, out=out), CUDA_TILES, **how)


def expected(x: np.ndarray) -> np.ndarray:
    peak = x.max(-1, keepdims=True)
    weights = np.exp(x - np.where(np.isinf(peak), 0, peak))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def adversarial(m: int, n: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Rows that are hard in ways of their own, then random ones."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, (m, 1, n))
    hard = [
        lambda row: row * 0 - np.inf,  # fully masked
        lambda row: np.where(np.arange(n) % 2, row, -np.inf),  # every second one masked; all, if there is but one
        lambda row: row + 1e4,  # far from zero
        lambda row: row * 0 - 5.5,  # all alike and negative
        lambda row: row * 1e-40,  # denormal
        lambda row: np.where(np.arange(n) == n - 1, 30.0, row),  # the last one has it all
    ]
    for i, change in enumerate(hard[: max(0, m - 1)]):
        x[i] = change(x[i])
    return stored(x, dtype)


@pytest.fixture(scope="module")
def kernels(gpu):
    """By dtype: the kernels of all row lengths."""
    made = {}

    def of(dtype):
        if dtype not in made:
            made[dtype] = gpu.build({f"softmax_{n}": kernel(n, x=rows(n, dtype), out=rows(n, dtype)) for n in LENGTHS})
        return made[dtype]

    return of


def check(out: np.ndarray, x: np.ndarray, dtype: str) -> None:
    want = expected(loaded(x))
    error = 1e-6 + 4e-7 * np.abs(loaded(x)[np.isfinite(loaded(x))]).max(initial=0)  # x - max is rounded
    assert (np.abs(loaded(out) - want) <= allowed(want, dtype, error * want)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_matches_float64(gpu, kernels, dtype, n):
    for m in ROWS:
        x = adversarial(m, n, dtype)
        check(gpu.run(kernels(dtype), f"softmax_{n}", [x], x), x, dtype)
        if n <= 1024:
            assert gpu.counts().barriers == 0


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_formats_and_wider_rows(gpu, x, out):
    n, formats = 100, {"x": rows(104, x), "out": rows(120, out)}
    values = stored(np.pad(np.random.default_rng(0).normal(size=(9, 1, n)), ((0, 0), (0, 0), (0, 4))), x)
    found = gpu.run(gpu.build({"f": kernel(n, **formats)}), "f", [values], np.zeros((9, 1, 120), out))
    check(found[..., :n], values[..., :n], out)
    assert (np.ascontiguousarray(found[..., n:]).view(np.uint8) == 0xFF).all()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "threads"), [(64, 4), (64, 32), (200, 32), (300, 64), (900, 256)])
def test_every_form(gpu, count, n, threads):
    form = row_form(n, vector_width(n, rows(n)), rows=count, threads=threads)
    x = adversarial(21, n, "float32")
    check(gpu.run(gpu.build({"f": kernel(n, form=form)}), "f", [x], x), x, "float32")
    blocks = -(-21 // (count * form.teams))
    assert gpu.counts().barriers == (0 if threads <= 32 else 2 * blocks)  # two reductions, whatever X


def test_rows_too_long_for_registers(gpu):
    n = 70_001
    x = adversarial(8, n, "float32")
    check(gpu.run(gpu.build({"f": kernel(n)}), "f", [x], x), x, "float32")
    assert gpu.counts().global_load_bytes == 2 * x.nbytes


@pytest.mark.parametrize("options", [{"rows": 3}, {"threads": 48}, {"threads": 2048}])
def test_forms_that_do_not_exist(options):
    with pytest.raises(ValueError, match="rows are 1, 2, 4 or 8"):
        row_form(100, 1, **options)


def test_extreme_settings(gpu, extremes):
    n, x = 300, adversarial(21, 300, "float32")
    variants = extremes(softmax.space(sized.softmax(CUDA_TILES, n), CUDA_TILES))
    module = gpu.build({f"f_{i}": kernel(n, variants=(variant,)) for i, variant in enumerate(variants)})
    with gpu.device.uncounted():
        for i in range(len(variants)):
            check(gpu.run(module, f"f_{i}", [x], x), x, "float32")
