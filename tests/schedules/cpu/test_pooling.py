"""Pooling against float64 over ragged batches."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
import tvm

from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu import pooling
from turbo_tvm.schedules.cpu.pooling import MODES
from turbo_tvm.schedules.cpu.tiles import NEON, cpu_tiles

RAGGED = (1, 2, 3, 4, 5, 7, 11, 12, 13, 31, 32, 33, 128, 511, 512)


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


def pool(tiles, hidden: int, mode: str, variants=(), **options):
    return pooling.pool(sized.pool(tiles, hidden, mode, **options), tiles, variants)


def space(tiles, hidden: int, mode: str):
    return pooling.space(sized.pool(tiles, hidden, mode), tiles)


def pooled(run_kernel, target, x: np.ndarray, lengths, mode: str, variants=()) -> np.ndarray:
    """All rows of the output, as a matrix."""
    rows, hidden = cpu_tiles(target).row_tile, x.shape[1]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype("int32")
    x = np.pad(x, ((0, -len(x) % rows), (0, 0)), constant_values=1e30).reshape(-1, rows, hidden)
    shape = (-(-len(lengths) // rows), rows, hidden)
    kernel = pool(cpu_tiles(target), hidden=hidden, mode=mode, variants=variants)
    return run_kernel(kernel, [x, cu_seqlens], shape, target).reshape(-1, hidden)


def expected(x: np.ndarray, lengths, mode: str) -> np.ndarray:
    parts = np.split(x.astype("float64"), np.cumsum(lengths)[:-1])
    return np.stack([part[0] if mode == "first" else part.mean(0) for part in parts])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("hidden", "lengths"), [(768, RAGGED), (100, (1,)), (5, (512,)), (384, (3,) * 12), (20, (1,) * 33)]
)
def test_matches_float64(hidden, lengths, mode, target, run_kernel):
    x = np.random.default_rng(0).standard_normal((sum(lengths), hidden), dtype="float32")
    out = pooled(run_kernel, target, x, lengths, mode)
    np.testing.assert_allclose(out[: len(lengths)], expected(x, lengths, mode), rtol=1e-5, atol=1e-5)
    assert (out[len(lengths) :] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "wider"), [("uint16", 0), ("uint16", 32), ("float32", 16)])
def test_formats(dtype, wider, mode, target, run_kernel, stored, loaded):
    tiles, hidden, lengths = cpu_tiles(target), 100, (1, 7, 3, 12, 1)
    values = np.random.default_rng(0).standard_normal((sum(lengths), hidden), dtype="float32")
    x = stored(values, dtype, hidden + wider)
    tiled = stored(np.pad(values, ((0, -len(x) % tiles.row_tile), (0, 0))), dtype, hidden + wider)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype("int32")
    shape = (-(-len(lengths) // tiles.row_tile), tiles.row_tile, hidden)
    kernel = pool(tiles, hidden=hidden, mode=mode, x=sized.rows(tiles, hidden + wider, dtype))
    out = run_kernel(kernel, [tiled.reshape(-1, tiles.row_tile, hidden + wider), cu_seqlens], shape, target)
    out = out.reshape(-1, hidden)
    np.testing.assert_allclose(out[: len(lengths)], expected(loaded(x, hidden), lengths, mode), rtol=1e-5, atol=1e-5)
    assert (out[len(lengths) :] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_other_sequences_do_not_leak(mode, host_target, run_kernel):
    lengths = (6, 9, 4)
    x = np.full((sum(lengths), 40), np.nan, "float32")
    x[6:15] = np.random.default_rng(0).standard_normal((9, 40))
    out = pooled(run_kernel, host_target, x, lengths, mode)
    np.testing.assert_allclose(out[1], expected(x, lengths, mode)[1], rtol=1e-5, atol=1e-6)
    assert np.isnan(out[[0, 2]]).all()


@pytest.mark.parametrize("row", [0, 2])
def test_rows_that_are_named(row, host_target, run_kernel):
    """In the place of cu_seqlens, any rows and one more; or a row after each."""
    tiles, x = cpu_tiles(host_target), np.random.default_rng(0).standard_normal((5, 4, 40), dtype="float32")
    rows = np.array([7, 3, 3, 12, -99], "int32")
    kernel = pool(tiles, hidden=40, mode="first", row=row)
    shape = (-(-4 // tiles.row_tile), tiles.row_tile, 40)
    out = run_kernel(kernel, [x.reshape(-1, tiles.row_tile, 40), rows], shape, host_target).reshape(-1, 40)
    np.testing.assert_array_equal(out[:4], x.reshape(-1, 40)[rows[:4] + row])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="unknown pooling mode 'max': use one of first, mean"):
        pool(NEON, hidden=64, mode="max")


def test_compiles_for_neon(assembly, neon_target):
    assert "fadd\tv" in assembly(pool(NEON, hidden=64, mode="mean"), neon_target)


def check_variants(run_kernel, target, lengths, variants):
    x = np.random.default_rng(0).standard_normal((sum(lengths), 100), dtype="float32")
    out = pooled(run_kernel, target, x, lengths, "mean", variants)
    np.testing.assert_allclose(out[: len(lengths)], expected(x, lengths, "mean"), rtol=1e-5, atol=1e-5)
    assert (out[len(lengths) :] == 0).all()


def test_extreme_settings(run_kernel, target, extremes):
    for variant in extremes(space(cpu_tiles(target), hidden=100, mode="mean")):
        check_variants(run_kernel, target, RAGGED, (variant,))


def test_variants_by_rows(run_kernel, host_target):
    few, many = Variant((("rows", 2),), 2 * cpu_tiles(host_target).row_tile), Variant((("rows", 8),))
    for lengths in ((1,), (3, 1), (20, 9)):
        check_variants(run_kernel, host_target, lengths, (few, many))


@pytest.mark.parametrize("mode", MODES)
def test_the_default_setting_is_what_is_done_without_any(mode):
    usual = Variant(tuple(space(NEON, hidden=100, mode=mode).default.items()))
    options = {"hidden": 100, "mode": mode}
    tvm.ir.assert_structural_equal(pool(NEON, **options), pool(NEON, variants=(usual,), **options))


def test_settings_that_do_not_exist():
    assert space(NEON, hidden=64, mode="first") == Space()
    with pytest.raises(ValueError, match="knob rows cannot be 3; it is one of 2, 4, 8"):
        pool(NEON, hidden=64, mode="mean", variants=(Variant((("rows", 3),)),))
