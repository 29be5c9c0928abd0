"""The elementary functions against float64, on the host and on AVX2, as scalars and as vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tvm.script import tirx as T

from turbo_tvm.ops import formats
from turbo_tvm.schedules.common import vector_math

LANES = 16


def elementwise(function, blocks: int):
    """y[i] = function(x[i]) as vectors of LANES, then as scalars."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((blocks, LANES), "float32"), y: T.Buffer((2, blocks, LANES), "float32")):
        T.func_attr({"tirx.noalias": True})
        for block in range(blocks):
            for lane in T.vectorized(LANES):
                y[0, block, lane] = function(x[block, lane])
        for block, lane in T.grid(blocks, LANES):
            y[1, block, lane] = function(x[block, lane])

    return kernel


def evaluate(function, run_kernel, target, x):
    x = np.resize(x.astype("float32"), (-(-x.size // LANES), LANES))
    both = run_kernel(elementwise(function, len(x)), [x], (2, *x.shape), target)
    return x.astype("float64"), both.astype("float64")


def gelu64(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


REFERENCES = {
    "gelu": gelu64,
    "gelu_bf16": gelu64,
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * 0.5 * (1 + np.tanh(1.702 / 2 * x)),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
POINTS = np.concatenate(
    [
        np.linspace(-12, 12, 40_001),
        np.geomspace(1e-30, 1e4, 2_000),
        -np.geomspace(1e-30, 1e4, 2_000),
        [0.0, -0.0, 1e4, -1e4, 3.4e38, -3.4e38],
    ]
)


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


def test_exp_is_accurate_to_a_few_ulp(run_kernel, target):
    x, y = evaluate(vector_math.exp, run_kernel, target, np.linspace(-87, 88, 100_001))
    assert np.abs(y / np.exp(x) - 1).max() <= 3e-7


def test_exp_saturates(run_kernel, target):
    points = np.array([-87.5, -88, -100, -1e4, -1e30, -3.4e38, 89, 1e4, 3.4e38])
    _, y = evaluate(vector_math.exp, run_kernel, target, points)
    assert np.isfinite(y).all()
    assert (y.reshape(2, -1)[:, 1:6] == 0).all()


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_functions_match_float64(name, run_kernel, target):
    x, y = evaluate(getattr(vector_math, name), run_kernel, target, POINTS)
    with np.errstate(over="ignore"):
        expected = REFERENCES[name](x)
    scale = np.maximum(1, np.abs(x)) if "lu" in name else 1
    assert (np.abs(y - expected) / scale).max() <= (8e-5 if name == "gelu_bf16" else 4e-7)


@pytest.mark.parametrize("name", ["gelu", "gelu_bf16"])
def test_gelu_is_0_or_its_argument_far_from_0(name, run_kernel, target):
    x, y = evaluate(getattr(vector_math, name), run_kernel, target, np.array([-3.4e38, -1e4, -50, 50, 1e4, 3.4e38]))
    np.testing.assert_allclose(y[:, x >= 0], np.stack([x[x >= 0]] * 2), rtol=1e-6)
    assert (np.abs(y[:, x < 0]) <= 1e-6 * np.abs(x[x < 0])).all()


def test_tanh_keeps_its_relative_accuracy_near_zero(run_kernel, target):
    x, y = evaluate(vector_math.tanh, run_kernel, target, np.geomspace(1e-30, 1, 5_000))
    assert np.abs(y / np.tanh(x) - 1).max() <= 6e-7


@pytest.mark.parametrize("name", ["exp", *REFERENCES])
@pytest.mark.parametrize("target_fixture", ["host_target", "neon_target"])
def test_no_function_calls_libm(name, target_fixture, assembly, request):
    target = request.getfixturevalue(target_fixture)
    text = assembly(elementwise(getattr(vector_math, name), 4), target)
    assert not any(f"{call}f" in text for call in ("exp", "erf", "tanh", "floor", "round"))


def test_activation_by_name():
    assert vector_math.activation("gelu") is vector_math.gelu
    assert vector_math.activation(None) is vector_math.identity
    assert vector_math.activation("gelu", formats.BF16) is vector_math.gelu_bf16
    assert vector_math.activation("tanh", formats.BF16) is vector_math.tanh


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'swish': use one of gelu, gelu_tanh"):
        vector_math.activation("swish")
