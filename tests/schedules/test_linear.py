"""The matrix kernel against float64 over ragged shapes and every epilogue, and a look at its machine code."""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest

from turbo_tvm.schedules import linear, tiles

EPS = 1e-5


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


def gelu64(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTIVATIONS = {
    None: lambda x: x,
    "gelu": gelu64,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def pack(geometry, w, bias):
    """NumPy's version of `pack_weight` and `pack_bias`."""
    n, k = w.shape
    panels, columns = geometry.panels(n), geometry.col_tile
    padded = np.zeros((panels * columns, k), "float32")
    padded[:n] = w
    padded_bias = np.zeros(panels * columns, "float32")
    padded_bias[:n] = bias
    return np.ascontiguousarray(padded.reshape(panels, columns, k).transpose(0, 2, 1)), padded_bias


@functools.cache
def kernel_of(geometry, **options):
    return linear.linear(geometry, **options)


def check(run_kernel, target, t, k, n, activation=None, residual=False, norm=False):
    geometry = tiles.cpu_tiles(target)
    x, extra = draw(1, t, geometry.row_tile, k), draw(2, t, geometry.row_tile, n)
    w, bias, gamma, beta = draw(3, n, k) / np.float32(math.sqrt(k)), draw(4, n), draw(5, n), draw(6, n)
    inputs = [x, *pack(geometry, w, bias)] + [extra] * residual + [gamma, beta] * norm
    options = {"activation": activation, "residual": residual, "norm_eps": EPS if norm else None}
    kernel = kernel_of(geometry, k=k, n=n, **options)
    out = run_kernel(kernel, inputs, (t, geometry.row_tile, n), target)

    expected = ACTIVATIONS[activation](x.astype("float64") @ w.T.astype("float64") + bias) + extra * residual
    if norm:
        mean, variance = expected.mean(-1, keepdims=True), expected.var(-1, keepdims=True)
        expected = (expected - mean) / np.sqrt(variance + EPS) * gamma + beta
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-5 * math.sqrt(max(1, k / 100)))


@pytest.mark.parametrize("t", [1, 2, 7, 9, 17])
def test_row_counts(run_kernel, target, t):
    check(run_kernel, target, t, 96, 96)


@pytest.mark.parametrize("k,n", [(1, 1), (3, 2), (100, 36), (36, 100), (96, 1003), (37, 33), (5, 64)])
def test_columns_that_do_not_fill_the_last_panel(run_kernel, target, k, n):
    check(run_kernel, target, 2, k, n, residual=True)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(run_kernel, target, activation):
    check(run_kernel, target, 2, 48, 36, activation=activation)  # whole panels and a tail


@pytest.mark.parametrize("n,residual,activation", [(96, True, None), (100, False, "gelu"), (7, True, "relu")])
def test_norm(run_kernel, target, n, residual, activation):
    check(run_kernel, target, 9, 36, n, activation=activation, residual=residual, norm=True)


def test_the_sizes_of_a_bert_base_layer(run_kernel, host_target):
    check(run_kernel, host_target, 2, 768, 3072, activation="gelu")
    check(run_kernel, host_target, 2, 3072, 768, residual=True, norm=True)


def test_surplus_rows_do_not_touch_the_others(run_kernel, host_target):
    geometry = tiles.cpu_tiles(host_target)
    x, (w, bias) = draw(1, 1, geometry.row_tile, 40), pack(geometry, draw(2, 64, 40), draw(3, 64))
    huge = x.copy()
    huge[:, 5:] = 3e38
    kernel = linear.linear(geometry, k=40, n=64)
    shape = (1, geometry.row_tile, 64)
    rows = [run_kernel(kernel, [a, w, bias], shape, host_target)[:, :4] for a in (x, huge)]
    np.testing.assert_array_equal(*rows)


def test_a_row_does_not_depend_on_its_batch(run_kernel, host_target):
    geometry = tiles.cpu_tiles(host_target)
    x, (w, bias) = draw(1, 19, geometry.row_tile, 40), pack(geometry, draw(2, 70, 40), draw(3, 70))
    kernel = linear.linear(geometry, k=40, n=70, activation="gelu")
    together = run_kernel(kernel, [x, w, bias], (19, geometry.row_tile, 70), host_target)
    alone = run_kernel(kernel, [x[11:12], w, bias], (1, geometry.row_tile, 70), host_target)
    np.testing.assert_array_equal(together[11:12], alone)


@pytest.mark.parametrize("k,n", [(1, 1), (16, 32), (100, 36), (37, 1003), (768, 2)])
def test_packing(run_kernel, target, k, n):
    geometry = tiles.cpu_tiles(target)
    w, bias = draw(1, n, k), draw(2, n)
    packed, padded = pack(geometry, w, bias)
    np.testing.assert_array_equal(run_kernel(linear.pack_weight(geometry, k=k, n=n), [w], packed.shape, target), packed)
    np.testing.assert_array_equal(run_kernel(linear.pack_bias(geometry, n=n), [bias], padded.shape, target), padded)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        linear.linear(tiles.AVX2, k=8, n=8, activation="swish")


def test_optional_inputs_are_no_parameters():
    def names(**options):
        return [p.name for p in linear.linear(tiles.AVX2, k=8, n=32, **options).params]

    assert names() == ["x", "weight", "bias", "out"]
    assert names(residual=True) == ["x", "weight", "bias", "residual_rows", "out"]
    assert names(norm_eps=1e-5) == ["x", "weight", "bias", "gamma", "beta", "out"]
    assert names(residual=True, norm_eps=1e-5)[3:6] == ["residual_rows", "gamma", "beta"]


def fma_blocks(text: str, instruction: str) -> list[list[str]]:
    """The basic blocks that multiply and accumulate."""
    blocks = [block.splitlines() for block in re.split(r"\n\.L\w+:|\n\w+:|\n\tj\w+\t.*|\n\tb\.\w+\t.*", text)]
    return [block for block in blocks if any(instruction in line for line in block)]


@pytest.mark.parametrize("n", [96, 100])
@pytest.mark.parametrize("mcpu,register,geometry", [("znver4", "zmm", tiles.AVX512), ("x86-64-v3", "ymm", tiles.AVX2)])
def test_the_inner_loop_keeps_its_tile_in_registers(assembly, mcpu, register, geometry, n):
    text = assembly(kernel_of(geometry, k=96, n=n), {"kind": "llvm", "mcpu": mcpu})
    (loop,) = fma_blocks(text, "vfmadd")
    count = geometry.row_tile * geometry.col_tile // geometry.lanes
    assert sum("vfmadd" in line for line in loop) == count
    assert sum("prefetch" in line for line in loop) == geometry.col_tile // 16
    assert not [line for line in loop if re.search(rf"vmov\w+\s+%{register}\d+, .*\(", line)], "a store"
    assert not [line for line in loop if re.search(rf"vmov\w+\s+.*\(%r[sb]p\).*%{register}", line)], "a reload"
    assert "AllocWorkspace" not in text


def test_neon_compiles_to_fused_multiply_adds(assembly, neon_target):
    geometry = tiles.cpu_tiles(neon_target)
    assert geometry is tiles.NEON
    text = assembly(linear.linear(geometry, k=96, n=100, activation="gelu", residual=True, norm_eps=EPS), neon_target)
    loop = max(fma_blocks(text, "fmla"), key=lambda block: sum("prfm" in line for line in block))
    assert sum("fmla" in line for line in loop) == geometry.row_tile * geometry.col_tile // geometry.lanes
    assert not [line for line in loop if re.search(r"\tst[rp]\tq", line)]
