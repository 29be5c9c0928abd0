"""Embedding against float64: one to three tables, with and without the layer norm, in fp32 and bf16."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
import tvm

from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu import embedding as schedule
from turbo_tvm.schedules.cpu.tiles import NEON, cpu_tiles


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


def embedding(tiles, hidden: int, tables: int, variants=(), **options):
    return schedule.embedding(sized.embedding(tiles, hidden, tables, **options), tiles, variants)


def space(tiles, hidden: int, tables: int, **options):
    return schedule.space(sized.embedding(tiles, hidden, tables, **options), tiles)


def inputs(tiles, hidden: int, table_rows, tiles_count: int):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, rows, (tiles_count, tiles.row_tile), dtype="int32") for rows in table_rows]
    tables = [rng.standard_normal((rows, hidden), dtype="float32") for rows in table_rows]
    return ids, tables


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * gamma + beta


@pytest.mark.parametrize("norm_eps", [None, 1e-12])
@pytest.mark.parametrize(
    ("hidden", "table_rows", "tiles_count"),
    [(768, (1000, 512, 2), 7), (100, (50, 3), 1), (64, (5,), 2), (5, (9, 4, 1), 33)],
)
def test_matches_float64(hidden, table_rows, tiles_count, norm_eps, target, run_kernel):
    tiles = cpu_tiles(target)
    ids, tables = inputs(tiles, hidden, table_rows, tiles_count)
    gamma, beta = np.random.default_rng(1).standard_normal((2, hidden)).astype("float32")
    expected = sum(table.astype("float64")[i] for i, table in zip(ids, tables, strict=True))
    arguments = [*ids, *tables]
    if norm_eps is not None:
        expected = layer_norm(expected, gamma, beta, norm_eps)
        arguments += [gamma, beta]
    kernel = embedding(tiles, hidden=hidden, tables=len(tables), norm_eps=norm_eps)
    out = run_kernel(kernel, arguments, (tiles_count, tiles.row_tile, hidden), target)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("wider", [0, 32])
@pytest.mark.parametrize(
    ("table_type", "out_type"), [("uint16", "uint16"), ("uint16", "float32"), ("float32", "uint16")]
)
def test_formats(table_type, out_type, wider, norm_eps, target, run_kernel, stored, loaded):
    tiles, hidden = cpu_tiles(target), 100
    ids, tables = inputs(tiles, hidden, (50, 30, 2), 3)
    tables = [stored(table, table_type) for table in tables]
    gamma, beta = np.random.default_rng(1).standard_normal((2, hidden)).astype("float32")
    out = sized.rows(tiles, hidden + wider, out_type)
    kernel = embedding(tiles, hidden=hidden, tables=3, norm_eps=norm_eps, table_type=table_type, out=out)
    arguments = [*ids, *tables, *([gamma, beta] if norm_eps else [])]
    got = loaded(run_kernel(kernel, arguments, (3, tiles.row_tile, out.width), target, out_type), hidden)
    wanted = sum(loaded(table, hidden)[i] for i, table in zip(ids, tables, strict=True))
    half_ulp = 2.0**-8 if out_type == "uint16" else 0.0
    bound = 1e-5 + half_ulp * np.abs(wanted)
    if norm_eps is not None:  # it reads what was rounded, and a row's mean and deviation move by less than that
        deviation = np.sqrt(wanted.var(-1, keepdims=True) + norm_eps)
        wanted = layer_norm(wanted, gamma, beta, norm_eps)
        bound = 2e-5 + 3 * bound.max(-1, keepdims=True) / deviation * np.abs(gamma) + half_ulp * np.abs(wanted)
    assert (np.abs(got - wanted) - bound).max() <= 0


def test_first_and_last_row_of_a_table(host_target, run_kernel):
    tiles = cpu_tiles(host_target)
    table = np.arange(3 * 16, dtype="float32").reshape(3, 16)
    ids = np.full((1, tiles.row_tile), 2, "int32")
    ids[0, 0] = 0
    out = run_kernel(embedding(tiles, hidden=16, tables=1), [ids, table], (1, tiles.row_tile, 16))
    np.testing.assert_array_equal(out[0], table[ids[0]])


@pytest.mark.parametrize("tables", [0, 4])
def test_a_wrong_number_of_tables_is_refused(tables):
    with pytest.raises(ValueError, match=f"tables = {tables}: an embedding sums 1 to 3 tables"):
        embedding(NEON, hidden=64, tables=tables)


def test_compiles_for_neon(assembly, neon_target):
    text = assembly(embedding(NEON, hidden=64, tables=3, norm_eps=1e-5), neon_target)
    assert "fadd\tv" in text


def check_variants(run_kernel, target, batches, variants):
    tiles, hidden = cpu_tiles(target), 203
    gamma, beta = np.random.default_rng(1).standard_normal((2, hidden)).astype("float32")
    kernel = embedding(tiles, hidden=hidden, tables=2, norm_eps=1e-5, variants=variants)
    for count in batches:
        ids, tables = inputs(tiles, hidden, (50, 30), count)
        out = run_kernel(kernel, [*ids, *tables, gamma, beta], (count, tiles.row_tile, hidden), target)
        summed = sum(table.astype("float64")[i] for i, table in zip(ids, tables, strict=True))
        np.testing.assert_allclose(out, layer_norm(summed, gamma, beta, 1e-5), rtol=1e-5, atol=1e-5)


def test_extreme_settings(run_kernel, target, extremes):
    for variant in extremes(space(cpu_tiles(target), hidden=203, tables=2, norm_eps=1e-5)):
        check_variants(run_kernel, target, (3,), (variant,))


def test_variants_by_rows(run_kernel, host_target):
    few = Variant((("chains", 2),), 2 * cpu_tiles(host_target).row_tile)
    check_variants(run_kernel, host_target, (1, 2, 3), (few, Variant((("chains", 8),))))


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_the_default_setting_is_what_is_done_without_any(norm_eps):
    options = {"hidden": 100, "tables": 2, "norm_eps": norm_eps}
    usual = Variant(tuple(space(NEON, **options).default.items()))
    tvm.ir.assert_structural_equal(embedding(NEON, **options), embedding(NEON, variants=(usual,), **options))


def test_settings_that_do_not_exist():
    assert space(NEON, hidden=64, tables=1) == Space()
    with pytest.raises(ValueError, match="knob chains cannot be 3; it is one of 2, 4, 8"):
        embedding(NEON, hidden=64, tables=1, norm_eps=1e-5, variants=(Variant((("chains", 3),)),))
    with pytest.raises(ValueError, match="there is no knob 'chains'"):
        embedding(NEON, hidden=64, tables=1, variants=(Variant((("chains", 2),)),))
