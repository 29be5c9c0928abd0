"""Weights in the kernels' layout: packed as NumPy packs them, in fp32 and in pairs of bf16."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import sized_operators as sized

from turbo_tvm.schedules.common import weights
from turbo_tvm.schedules.cpu import tiles


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def panels(geometry, w):
    """(n, anything) rows in panels of columns, with zeros beyond n."""
    padded = np.zeros((geometry.panels(len(w)) * geometry.col_tile, w.shape[1]), w.dtype)
    padded[: len(w)] = w
    return padded.reshape(-1, geometry.col_tile, w.shape[1]).transpose(0, 2, 1)


@pytest.mark.parametrize("k,n", [(1, 1), (16, 32), (100, 36), (37, 1003), (768, 2)])
def test_weights(run_kernel, target, k, n):
    geometry, w = tiles.cpu_tiles(target), draw(1, n, k)
    wanted = panels(geometry, w)
    out = run_kernel(weights.pack_weight(sized.pack_weight(geometry, k, n), geometry), [w], wanted.shape, target)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("k,n", [(2, 1), (32, 32), (34, 31), (100, 36), (38, 1003), (768, 2)])
def test_weights_in_pairs(run_kernel, target, k, n):
    geometry, w = tiles.cpu_tiles(target), draw(1, n, k)
    wanted = panels(geometry, w.astype(ml_dtypes.bfloat16).view("int32"))
    out = run_kernel(
        weights.pack_weight(sized.pack_weight(geometry, k, n, "uint16"), geometry), [w], wanted.shape, target, "int32"
    )
    np.testing.assert_array_equal(out, wanted)


def test_an_odd_number_of_columns_has_no_pairs():
    with pytest.raises(ValueError, match="k = 7: pairs need an even number of columns"):
        weights.pack_weight(sized.pack_weight(tiles.AVX512, 7, 8, "uint16"), tiles.AVX512)


@pytest.mark.parametrize("n", [1, 8, 32, 33, 1003])
def test_biases(run_kernel, target, n):
    geometry, bias = tiles.cpu_tiles(target), draw(2, n)
    wanted = panels(geometry, bias[:, None]).reshape(-1)
    out = run_kernel(weights.pack_bias(sized.pack_bias(geometry, n), geometry), [bias], wanted.shape, target)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("rows,columns", [(1, 1), (5, 7), (33, 64), (1003, 100)])
def test_tables(run_kernel, target, rows, columns):
    table = draw(3, rows, columns)
    kernel = weights.cast_weight(sized.cast_weight((rows, columns), "uint16"), tiles.cpu_tiles(target))
    out = run_kernel(kernel, [table], table.shape, target, "uint16")
    np.testing.assert_array_equal(out, table.astype(ml_dtypes.bfloat16).view("uint16"))
