"""Gated activation against float64."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
from cuda_kernels import DTYPES, allowed, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cuda.gate import gate, space
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

pytestmark = pytest.mark.xdist_group("cuda-norm")


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(gpu, dtype):
    shapes = {"plain": (160, 0, False), "odd": (37, 3, True), "one": (1, 0, False)}
    formats = {
        name: {"x": Operand.rows(2 * n + wider, dtype), "out": Operand.rows(n + wider, dtype)}
        for name, (n, wider, _) in shapes.items()
    }
    kernels = {
        name: gate(sized.gate(CUDA_TILES, n, "silu", second=s, **formats[name]), CUDA_TILES)
        for name, (n, _, s) in shapes.items()
    }
    module = gpu.build(kernels)
    for name, (n, wider, second) in shapes.items():
        x = stored(3 * np.random.default_rng(0).normal(size=(19, 1, 2 * n + wider)), dtype)
        found = gpu.run(module, name, [x], np.zeros((19, 1, n + wider), x.dtype))
        halves = loaded(x)[..., :n], loaded(x)[..., n : 2 * n]
        active, linear = halves[::-1] if second else halves
        want = active / (1 + np.exp(-active)) * linear
        error = 1e-6 * np.maximum(1, np.abs(active)) * np.abs(linear)
        assert (np.abs(loaded(found[..., :n]) - want) <= allowed(want, dtype, error)).all()
        assert (np.ascontiguousarray(found[..., n:]).view(np.uint8) == 0xFF).all()


def test_extreme_settings(gpu, extremes):
    n, x = 37, np.random.default_rng(0).normal(size=(19, 1, 74)).astype("float32")
    active, linear = loaded(x[..., :n]), loaded(x[..., n:])
    operator = sized.gate(CUDA_TILES, n, "silu")
    variants = extremes(space(operator, CUDA_TILES))
    module = gpu.build({f"f_{i}": gate(operator, CUDA_TILES, (variant,)) for i, variant in enumerate(variants)})
    for i in range(len(variants)):
        found = gpu.run(module, f"f_{i}", [x], np.zeros((19, 1, n), np.float32))
        np.testing.assert_allclose(found, active / (1 + np.exp(-active)) * linear, rtol=2e-6, atol=1e-6)
