"""Rotary positions against float64: spans of heads, heads that turn in part, every storage, in place."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized

from turbo_tvm.schedules.cpu import rotary, tiles

HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
POSITIONS = 50
SHAPES = [  # columns, head_dim, dims that turn, spans
    (96, 16, 16, ((0, 4),)),
    (72, 24, 24, ((24, 2),)),
    (40, 10, 6, ((0, 2), (30, 1))),
    (4, 2, 2, ((0, 2),)),
]


def table_of(dims: int) -> np.ndarray:
    angles = np.arange(POSITIONS)[:, None] * 100.0 ** (-np.arange(dims // 2) * 2 / dims)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype("float32")


def kernel_of(geometry, shape, **formats):
    columns, head_dim, dims, spans = shape
    sizes = {"head_dim": head_dim, "dims": dims, "positions": POSITIONS}
    return rotary.rotary(sized.rotary(geometry, columns, spans, **sizes, **formats), geometry)


def expected(x, ids, table, head_dim, dims, spans):
    out, half = x.copy(), dims // 2
    cosine, sine = np.split(table[ids].astype("float64"), 2, axis=-1)
    for first, heads in spans:
        for start in range(first, first + heads * head_dim, head_dim):
            low, high = x[..., start : start + half], x[..., start + half : start + dims]
            out[..., start : start + half] = low * cosine - high * sine
            out[..., start + half : start + dims] = high * cosine + low * sine
    return out


def inputs(geometry, columns, dims):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, geometry.row_tile, columns)).astype("float32")
    return x, rng.integers(0, POSITIONS, (3, geometry.row_tile)).astype("int32"), table_of(dims)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("uint16", "uint16"), ("float32", "uint16")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(run_kernel, stored, loaded, host_target, shape, dtypes):
    geometry, (columns, head_dim, dims, spans) = tiles.cpu_tiles(host_target), shape
    x, ids, table = inputs(geometry, columns, dims)
    x_rows, out_rows = (sized.rows(geometry, columns + 16, dtype) for dtype in dtypes)
    rows = stored(x, dtypes[0], columns + 16)
    kernel = kernel_of(geometry, shape, x=x_rows, out=out_rows)
    shape = (3, geometry.row_tile, columns + 16)
    got = loaded(run_kernel(kernel, [rows, ids, table], shape, host_target, dtypes[1]), columns)
    wanted = expected(loaded(rows, columns), ids, table, head_dim, dims, spans)
    assert (np.abs(got - wanted) - 1e-6 - HALF_ULP * (dtypes[1] == "uint16") * np.abs(wanted)).max() <= 0


@pytest.mark.parametrize("target", ["host_target", "avx2_target"])
def test_in_the_place_of_its_input(run_kernel, request, target):
    target = request.getfixturevalue(target)
    geometry, (columns, head_dim, dims, spans) = tiles.cpu_tiles(target), SHAPES[0]
    x, ids, table = inputs(geometry, columns, dims)
    kernel = kernel_of(geometry, SHAPES[0])
    wanted = run_kernel(kernel, [x, ids, table], x.shape, target)
    np.testing.assert_array_equal(run_kernel(kernel, [x, ids, table], x.shape, target, out=x), wanted)
    np.testing.assert_allclose(wanted, expected(x.astype("f8"), ids, table, head_dim, dims, spans), atol=1e-6)


def test_neon_compiles_to_vectors_without_allocations(assembly, neon_target):
    text = assembly(kernel_of(tiles.cpu_tiles(neon_target), SHAPES[0]), neon_target)
    assert "fmul" in text and ".4s" in text and "AllocWorkspace" not in text
