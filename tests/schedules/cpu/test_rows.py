"""Copies between storages of rows: to tiles and back, to bf16."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import sized_operators as sized

from turbo_tvm.schedules.cpu import rows, tiles


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("count", [1, 3, 4, 5, 12, 31])
@pytest.mark.parametrize("columns", [1, 33])
def test_to_tiles_and_back(run_kernel, target, count, columns):
    geometry, x = tiles.cpu_tiles(target), draw(count, columns)
    shape = (-(-count // geometry.row_tile), geometry.row_tile, columns)
    tiled = run_kernel(rows.tile_rows(sized.tile_rows(geometry, columns), geometry), [x], shape, target)
    np.testing.assert_array_equal(tiled.reshape(-1, columns)[:count], x)
    assert (tiled.reshape(-1, columns)[count:] == 0).all()
    flat = run_kernel(rows.untile_rows(sized.untile_rows(geometry, columns), geometry), [tiled], x.shape, target)
    np.testing.assert_array_equal(flat, x)


@pytest.mark.parametrize("wider", [0, 1, 32])
@pytest.mark.parametrize("columns", [1, 16, 37, 768])
def test_cast_rows(run_kernel, loaded, target, columns, wider):
    geometry = tiles.cpu_tiles(target)
    x = draw(3, geometry.row_tile, columns)
    operator = sized.cast_rows(geometry, columns, sized.rows(geometry, columns + wider, "uint16"))
    out = run_kernel(rows.cast_rows(operator, geometry), [x], (3, geometry.row_tile, columns + wider), target, "uint16")
    np.testing.assert_array_equal(loaded(out, columns), x.astype(ml_dtypes.bfloat16).astype("float64"))


def test_every_bit_of_bf16_rows_that_are_as_wide_as_their_columns(run_kernel, host_target):
    geometry = tiles.cpu_tiles(host_target)
    x = draw(1, geometry.row_tile, 20)
    operator = sized.cast_rows(geometry, 20, sized.rows(geometry, 20, "uint16"))
    out = run_kernel(rows.cast_rows(operator, geometry), [x], x.shape, host_target, "uint16")
    np.testing.assert_array_equal(out, x.astype(ml_dtypes.bfloat16).view("uint16"))
