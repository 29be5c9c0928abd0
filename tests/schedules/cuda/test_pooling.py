"""Pooling, and copies between formats, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
from cuda_kernels import DTYPES, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.runtime import batch
from turbo_tvm.schedules.common.space import Space
from turbo_tvm.schedules.cpu.pooling import MODES
from turbo_tvm.schedules.cuda import rows
from turbo_tvm.schedules.cuda.pooling import pool, space
from turbo_tvm.schedules.cuda.rows import cast_rows
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

pytestmark = pytest.mark.xdist_group("cuda-embedding")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("hidden", "wider"), [(768, 0), (100, 4), (33, 0), (1, 0), (4099, 0)])
def test_matches_float64(gpu, dtype, mode, hidden, wider):
    lengths = (1, 2, 7, 8, 9, 31, 64, 3)
    values = np.random.default_rng(0).normal(size=(sum(lengths), 1, hidden + wider))
    x = stored(values, dtype)
    operator = sized.pool(CUDA_TILES, hidden, mode, x=Operand.rows(hidden + wider, dtype))
    module = gpu.build({"f": pool(operator, CUDA_TILES)})
    limits = batch.cu_seqlens_of(list(lengths))
    found = gpu.run(module, "f", [x, limits], np.zeros((len(lengths), 1, hidden), np.float32))[:, 0]
    parts = np.split(loaded(x)[:, 0, :hidden], limits[1:-1])
    want = np.stack([part[0] if mode == "first" else part.mean(0) for part in parts])
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [0, 2])
def test_rows_that_are_named(gpu, row):
    """In the place of cu_seqlens, any rows and one more; or a row after each."""
    x = np.random.default_rng(0).normal(size=(20, 1, 40)).astype("float32")
    rows = np.array([7, 3, 3, 12, -99], "int32")
    module = gpu.build({"f": pool(sized.pool(CUDA_TILES, 40, "first", row=row), CUDA_TILES)})
    found = gpu.run(module, "f", [x, rows], np.zeros((4, 1, 40), np.float32))
    np.testing.assert_array_equal(found, x[rows[:4] + row])


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="unknown pooling mode 'max'"):
        pool(sized.pool(CUDA_TILES, 8, "max"), CUDA_TILES)


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
@pytest.mark.parametrize(("columns", "wider"), [(768, 0), (33, 0), (100, 4)])
def test_casts_round_to_nearest_even(gpu, dtype, columns, wider):
    x = (np.random.default_rng(0).normal(size=(17, 1, columns)) * 10.0 ** np.arange(-8, 9)[:, None, None]).astype("f4")
    x[0, 0, 0], x[1, 0, 0], x[2, 0, 0] = np.inf, -np.inf, 1e-44
    operator = sized.cast_rows(CUDA_TILES, columns, Operand.rows(columns + wider, dtype))
    module = gpu.build({"f": cast_rows(operator, CUDA_TILES)})
    found = gpu.run(module, "f", [x], np.zeros((17, 1, columns + wider), dtype))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found[..., :columns], stored(x, dtype))
    assert (np.ascontiguousarray(found[..., columns:]).view(np.uint8) == 0xFF).all()


def test_extreme_settings_of_the_mean(gpu, extremes):
    lengths, operator = (1, 2, 15, 16, 17, 40), sized.pool(CUDA_TILES, 100, "mean")
    limits = batch.cu_seqlens_of(list(lengths))
    x = np.random.default_rng(0).normal(size=(sum(lengths), 1, 100)).astype("float32")
    want = np.stack([part.mean(0) for part in np.split(loaded(x)[:, 0], limits[1:-1])])
    variants = extremes(space(operator, CUDA_TILES))
    module = gpu.build({f"f_{i}": pool(operator, CUDA_TILES, (variant,)) for i, variant in enumerate(variants)})
    for i in range(len(variants)):
        found = gpu.run(module, f"f_{i}", [x, limits], np.zeros((len(lengths), 1, 100), np.float32))[:, 0]
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_a_first_row_leaves_nothing_to_decide():
    assert space(sized.pool(CUDA_TILES, 100, "first"), CUDA_TILES) == Space()


def test_extreme_settings_of_casts(gpu, extremes):
    x = np.random.default_rng(0).normal(size=(17, 1, 33)).astype("float32")
    operator = sized.cast_rows(CUDA_TILES, 33, Operand.rows(33, "uint16"))
    variants = extremes(rows.space(operator, CUDA_TILES))
    module = gpu.build({f"f_{i}": cast_rows(operator, CUDA_TILES, (variant,)) for i, variant in enumerate(variants)})
    for i in range(len(variants)):
        found = gpu.run(module, f"f_{i}", [x], np.zeros((17, 1, 33), "uint16"))
        np.testing.assert_array_equal(found, stored(x, "uint16"))
