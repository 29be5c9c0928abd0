"""Layer norm and L2 norm against float64: ragged widths, every storage, and rows that break naive formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sized_operators as sized
import tvm

from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import normalization, tiles

WIDTHS = [1, 2, 7, 16, 36, 64, 100, 384, 768, 1003]
EPS = 1e-12
HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
FORMATS = [  # dtypes of x, residual and output, and by how much their rows are wider than the columns
    ("uint16", "uint16", "uint16", (0, 0, 0)),
    ("uint16", "float32", "float32", (32, 16, 0)),
    ("float32", "uint16", "uint16", (0, 1, 32)),
    ("float32", "float32", "float32", (16, 1, 2)),
]


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def norm(geometry, n, variants=(), **options):
    return normalization.norm(sized.norm(geometry, n, **options), geometry, variants)


def l2_normalize(geometry, n, variants=(), **options):
    return normalization.l2_normalize(sized.l2_normalize(geometry, n, **options), geometry, variants)


def space(geometry):
    return normalization.space(sized.norm(geometry, 8), geometry)


def layer_norm64(x, gamma, beta, eps=EPS):
    x = x.astype("float64")
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * gamma + beta


def run_layer_norm(run_kernel, target, x, gamma, beta, eps=EPS):
    kernel = norm(tiles.cpu_tiles(target), n=x.shape[-1], eps=eps)
    return run_kernel(kernel, [x, gamma, beta], x.shape, target)


@pytest.mark.parametrize("n,residual", [*zip(WIDTHS, itertools.cycle([False, True])), (768, False)])
def test_layer_norm(run_kernel, target, n, residual):
    geometry = tiles.cpu_tiles(target)
    x, extra = draw(1, 3, geometry.row_tile, n), draw(2, 3, geometry.row_tile, n)
    gamma, beta = draw(3, n), draw(4, n)
    kernel = norm(geometry, n=n, eps=1e-5, residual=residual)
    out = run_kernel(kernel, [x, *([extra] * residual), gamma, beta], x.shape, target)
    expected = layer_norm64(x.astype("float64") + extra * residual, gamma, beta, 1e-5)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n,residual", [(1, False), (7, True), (100, False), (768, True)])
def test_rms_norm(run_kernel, target, n, residual):
    geometry = tiles.cpu_tiles(target)
    x, extra, gamma = draw(1, 3, geometry.row_tile, n), draw(2, 3, geometry.row_tile, n), draw(3, n)
    x[0, 0] += 1e3
    kernel = norm(geometry, n=n, eps=1e-5, rms=True, residual=residual)
    out = run_kernel(kernel, [x, *([extra] * residual), gamma], x.shape, target)
    total = x.astype("float64") + extra * residual
    wanted = total / np.sqrt((total * total).mean(-1, keepdims=True) + 1e-5) * gamma
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


def test_parameters_follow_the_kind_of_norm():
    """Whether there is a beta decides what is computed: a kind that is unknown cannot be asked for."""
    names = [[p.name for p in norm(tiles.AVX2, 8, rms=rms, residual=not rms).params] for rms in (False, True)]
    assert names == [["source", "residual_rows", "gamma", "beta", "result"], ["source", "gamma", "result"]]


def bound(wanted, dtype):
    return 1e-5 + (1e-5 + HALF_ULP * (dtype == "uint16")) * np.abs(wanted)


@pytest.mark.parametrize("n", [36, 100])
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_formats_of_layer_norm(run_kernel, stored, loaded, target, formats, n):
    geometry, (*dtypes, wider) = tiles.cpu_tiles(target), formats
    x, extra, out = (sized.rows(geometry, n + more, dtype) for more, dtype in zip(wider, dtypes, strict=True))
    rows = [stored(draw(i, 3, geometry.row_tile, n), f.dtype, f.width) for i, f in enumerate((x, extra))]
    gamma, beta = draw(3, n), draw(4, n)
    kernel = norm(geometry, n, eps=1e-5, residual=extra, x=x, out=out)
    shape = (3, geometry.row_tile, out.width)
    got = loaded(run_kernel(kernel, [*rows, gamma, beta], shape, target, out.dtype), n)
    wanted = layer_norm64(loaded(rows[0], n) + loaded(rows[1], n), gamma, beta, 1e-5)
    assert (np.abs(got - wanted) - bound(wanted, out.dtype)).max() <= 0


@pytest.mark.parametrize("n", [36, 100])
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_formats_of_l2_normalize(run_kernel, stored, loaded, target, formats, n):
    geometry, (*dtypes, wider) = tiles.cpu_tiles(target), formats
    x, _, out = (sized.rows(geometry, n + more, dtype) for more, dtype in zip(wider, dtypes, strict=True))
    rows = stored(draw(1, 3, geometry.row_tile, n), x.dtype, x.width)
    shape = (3, geometry.row_tile, out.width)
    kernel = l2_normalize(geometry, n=n, x=x, out=out)
    got = loaded(run_kernel(kernel, [rows], shape, target, out.dtype), n)
    wanted = loaded(rows, n) / np.linalg.norm(loaded(rows, n), axis=-1, keepdims=True)
    assert (np.abs(got - wanted) - bound(wanted, out.dtype)).max() <= 0


@pytest.mark.parametrize("mean", [1e4, -1e4, 1e6])
@pytest.mark.parametrize("n", [100, 768])
def test_a_mean_far_above_the_deviation_costs_no_accuracy(run_kernel, target, mean, n):
    x = (draw(1, 2, tiles.cpu_tiles(target).row_tile, n) + np.float32(mean)).astype("float32")
    gamma, beta = np.ones(n, "float32"), np.zeros(n, "float32")
    out = run_layer_norm(run_kernel, target, x, gamma, beta)
    np.testing.assert_allclose(out, layer_norm64(x, gamma, beta), rtol=1e-5, atol=1e-5)


def test_one_outlier_costs_no_accuracy(run_kernel, target):
    x = draw(1, 3, tiles.cpu_tiles(target).row_tile, 768)
    x[:, :, 0], x[1:, :, 700] = 1e5, -3e6
    gamma, beta = np.ones(768, "float32"), np.zeros(768, "float32")
    out = run_layer_norm(run_kernel, target, x, gamma, beta)
    np.testing.assert_allclose(out, layer_norm64(x, gamma, beta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 7, 100, 768])
def test_a_constant_row_gives_beta(run_kernel, target, n):
    rows = tiles.cpu_tiles(target).row_tile
    values = np.resize(np.array([0, 1, -3.7, 0.1, 1e4, 12345.678, 1e-20, -1e15, 3.3e7], "float32"), rows * 2)
    x = np.ascontiguousarray(np.broadcast_to(values.reshape(2, rows, 1), (2, rows, n)))
    gamma, beta = draw(1, n), draw(2, n)
    out = run_layer_norm(run_kernel, target, x, gamma, beta)
    np.testing.assert_array_equal(out, np.broadcast_to(beta, x.shape))


@pytest.mark.parametrize("n", WIDTHS)
def test_l2_normalize(run_kernel, target, n):
    geometry = tiles.cpu_tiles(target)
    x = draw(1, 4, geometry.row_tile, n)
    x[0, 1] = 0
    x[1, 0] *= 1e-15
    x[1, 1] *= 1e15
    out = run_kernel(l2_normalize(geometry, n=n), [x], x.shape, target)
    length = np.linalg.norm(x.astype("float64"), axis=-1, keepdims=True)
    np.testing.assert_allclose(out, x / np.maximum(length, 1e-12), rtol=1e-5, atol=1e-7)


def test_neon_compiles_to_vectors_without_allocations(assembly, neon_target):
    geometry = tiles.cpu_tiles(neon_target)
    for kernel in (
        norm(geometry, n=100, eps=EPS, residual=True),
        l2_normalize(geometry, n=100),
    ):
        text = assembly(kernel, neon_target)
        assert "fmla" in text
        assert "AllocWorkspace" not in text


@pytest.mark.parametrize("over", [0, 1], ids=["x", "residual"])
def test_layer_norm_in_the_place_of_an_input(run_kernel, target, over):
    geometry, n = tiles.cpu_tiles(target), 100
    rows, affine = [draw(i, 3, geometry.row_tile, n) for i in (1, 2)], [draw(3, n), draw(4, n)]
    kernel = norm(geometry, n=n, eps=1e-5, residual=True)
    wanted = run_kernel(kernel, [*rows, *affine], rows[0].shape, target)
    got = run_kernel(kernel, [*rows, *affine], rows[0].shape, target, out=rows[over])
    np.testing.assert_array_equal(got, wanted)


def test_l2_normalize_in_the_place_of_its_input(run_kernel, target):
    geometry, n = tiles.cpu_tiles(target), 100
    rows = draw(1, 3, geometry.row_tile, n)
    kernel = l2_normalize(geometry, n=n)
    wanted = run_kernel(kernel, [rows], rows.shape, target)
    np.testing.assert_array_equal(run_kernel(kernel, [rows], rows.shape, target, out=rows), wanted)


def kernels_of(geometry, n, **options):
    """Every kernel of this file, with the function that it computes of x, gamma and beta."""
    return {
        "layer": (norm(geometry, n=n, eps=1e-5, **options), lambda *a: layer_norm64(*a, 1e-5)),
        "rms": (
            norm(geometry, n=n, eps=1e-5, rms=True, **options),
            lambda x, gamma, _: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gamma,
        ),
        "l2": (
            l2_normalize(geometry, n=n, **options),
            lambda x, *_: x / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
    }


def check_kernels(run_kernel, target, batches, **options):
    geometry, n = tiles.cpu_tiles(target), 203  # on every target whole groups of vectors, further ones, and a rest
    gamma, beta = draw(3, n), draw(4, n)
    for name, (kernel, function) in kernels_of(geometry, n, **options).items():
        for t in batches:
            x = draw(t, t, geometry.row_tile, n)
            taken = {"layer": [gamma, beta], "rms": [gamma], "l2": []}[name]
            out = run_kernel(kernel, [x, *taken], x.shape, target)
            np.testing.assert_allclose(out, function(x.astype("float64"), gamma, beta), rtol=1e-5, atol=1e-5)


def test_extreme_settings(run_kernel, target, extremes):
    for variant in extremes(space(tiles.cpu_tiles(target))):
        check_kernels(run_kernel, target, (3,), variants=(variant,))


def test_variants_by_rows(run_kernel, host_target):
    few = Variant((("chains", 2),), 2 * tiles.cpu_tiles(host_target).row_tile)
    check_kernels(run_kernel, host_target, (1, 2, 3), variants=(few, Variant((("chains", 8),))))


def test_the_default_setting_is_what_is_done_without_any():
    usual = Variant(tuple(space(tiles.NEON).default.items()))
    plain, asked = kernels_of(tiles.NEON, 100), kernels_of(tiles.NEON, 100, variants=(usual,))
    for name, (kernel, _) in plain.items():
        tvm.ir.assert_structural_equal(kernel, asked[name][0])


@pytest.mark.parametrize("kernel", [norm, l2_normalize])
def test_settings_that_do_not_exist(kernel):
    with pytest.raises(ValueError, match="knob chains cannot be 3; it is one of 2, 4, 8"):
        kernel(tiles.AVX2, n=8, eps=EPS, variants=(Variant((("chains", 3),)),))
