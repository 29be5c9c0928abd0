"""Gated activation against float64: every activation, widths that are no whole vectors, every storage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sized_operators as sized

from turbo_tvm.schedules.cpu import gate, tiles

HALF_ULP = 2.0**-8  # of a bf16 number, relative to it
ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def check(run_kernel, stored, loaded, target, n, activation, second, dtypes, wider):
    geometry = tiles.cpu_tiles(target)
    x, out = (sized.rows(geometry, w + wider, dtype) for w, dtype in zip((2 * n, n), dtypes, strict=True))
    values = (4 * np.random.default_rng(0).standard_normal((3, geometry.row_tile, 2 * n))).astype("float32")
    values[0, 0, :2] = 60, -60
    rows = stored(values, x.dtype, x.width)
    kernel = gate.gate(sized.gate(geometry, n, activation, second=second, x=x, out=out), geometry)
    got = loaded(run_kernel(kernel, [rows], (3, geometry.row_tile, out.width), target, out.dtype), n)
    halves = np.split(loaded(rows, 2 * n), 2, axis=-1)
    active, linear = halves[::-1] if second else halves
    wanted = ACTIVATIONS[activation](active) * linear
    error = 5e-7 if out.dtype == "float32" else 1e-4  # of an activation, see vector_math
    bound = error * np.maximum(1, np.abs(active)) * np.abs(linear) + HALF_ULP * (out.dtype != "float32") * np.abs(
        wanted
    )
    assert (np.abs(got - wanted) - bound * 1.01 - 1e-7).max() <= 0


@pytest.mark.parametrize("target", ["host_target", "avx2_target"])
@pytest.mark.parametrize(("activation", "n", "second"), [("gelu", 160, False), ("silu", 37, True), ("tanh", 3, False)])
def test_fp32(run_kernel, stored, loaded, request, target, activation, n, second):
    target = request.getfixturevalue(target)
    check(run_kernel, stored, loaded, target, n, activation, second, ("float32", "float32"), 0)


@pytest.mark.parametrize("dtypes", [("uint16", "uint16"), ("float32", "uint16"), ("uint16", "float32")], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_other_storages_and_wider_rows(run_kernel, stored, loaded, host_target, activation, dtypes):
    check(run_kernel, stored, loaded, host_target, 72, activation, False, dtypes, 16)


def test_neon_compiles_to_vectors(assembly, neon_target):
    geometry = tiles.cpu_tiles(neon_target)
    text = assembly(gate.gate(sized.gate(geometry, 100, "silu"), geometry), neon_target)
    assert "fmla" in text and "expf" not in text
