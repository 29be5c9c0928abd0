"""bf16 as integers: conversion both ways for every bit pattern, and the order and the sum of a product of pairs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from turbo_tvm.schedules.cpu import bf16

LANES = 16
EVERY = np.arange(65536, dtype="uint16")


def elementwise(function, count: int, source: str, result: str) -> tvm.tirx.PrimFunc:
    """y[i] = function(x[i]) as vectors of LANES, then as scalars."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((count // LANES, LANES), source), y: T.Buffer((2, count // LANES, LANES), result)):
        T.func_attr({"tirx.noalias": True})
        for block in range(count // LANES):
            for lane in T.vectorized(LANES):
                y[0, block, lane] = function(x[block, lane])
        for block, lane in T.grid(count // LANES, LANES):
            y[1, block, lane] = function(x[block, lane])

    return kernel


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def evaluate(run_kernel, target):
    """`evaluate(function, x, result)`: the function of every element, the same as a vector and as a scalar."""

    def evaluate(function, x: np.ndarray, result: str) -> np.ndarray:
        x = np.resize(x, (-(-x.size // LANES), LANES))
        kernel = elementwise(function, x.size, str(x.dtype), result)
        vector, scalar = run_kernel(kernel, [x], (2, *x.shape), target, result)
        np.testing.assert_array_equal(vector.view("uint8"), scalar.view("uint8"))
        return vector.reshape(-1)

    return evaluate


def bits(*values: float) -> np.ndarray:
    return np.array(values, "float32").view("uint32")


def test_every_number_is_read_exactly(evaluate):
    got = evaluate(bf16.to_float, EVERY, "float32")
    np.testing.assert_array_equal(got.view("uint32"), EVERY.astype("uint32") << 16)


def test_every_number_makes_the_round_trip(evaluate):
    got = evaluate(lambda x: bf16.from_float(bf16.to_float(x)), EVERY, "uint16")
    np.testing.assert_array_equal(got, EVERY)  # NaNs, infinities, zeros of both signs and subnormals as well


def test_rounding_is_to_the_nearest_and_to_even(evaluate):
    low = (EVERY.astype("uint32") << 16)[np.isfinite(EVERY.view(ml_dtypes.bfloat16).astype("float32"))]
    rest = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "uint32")
    values = (low[:, None] + rest).reshape(-1).view("float32")  # among them every tie, and both neighbours of a tie
    got = evaluate(bf16.from_float, values, "uint16")[: values.size]
    np.testing.assert_array_equal(got, values.astype(ml_dtypes.bfloat16).view("uint16"))


def test_random_bits_are_rounded_as_by_a_reference(evaluate):
    values = np.random.default_rng(0).integers(0, 2**32, 1 << 18, "uint32").view("float32")
    values = values[~np.isnan(values)]
    got = evaluate(bf16.from_float, values, "uint16")[: values.size]
    np.testing.assert_array_equal(got, values.astype(ml_dtypes.bfloat16).view("uint16"))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (1 + 2**-8, 0x3F80),  # a tie: down to the even neighbour
        (1 + 3 * 2**-8, 0x3F82),  # and up
        (-(1 + 2**-8), 0xBF80),
        (-(1 + 3 * 2**-8), 0xBF82),
        (2**-133, 0x0001),  # the least subnormal
        (2**-134, 0x0000),  # half of it: a tie
        (-(2**-134), 0x8000),
        (1.5 * 2**-133, 0x0002),
        (2**-126 - 2**-149, 0x0080),  # the largest fp32 subnormal: up to the least normal number
        (3.3895314e38, 0x7F7F),  # the largest bf16
        (3.4028235e38, 0x7F80),  # the largest fp32 overflows
        (-3.4028235e38, 0xFF80),
        (np.inf, 0x7F80),
        (-np.inf, 0xFF80),
    ],
)
def test_rounding_by_hand(value, wanted, evaluate):
    assert evaluate(bf16.from_float, np.array([value], "float32"), "uint16")[0] == wanted


def test_a_nan_stays_one(evaluate):
    """Whatever makes or passes on a NaN leaves it quiet; payloads as large as any in use."""
    payloads = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7FC0FFFF, 0xFFC12345], "uint32")
    got = evaluate(bf16.from_float, payloads.view("float32"), "uint16")[: payloads.size]
    assert np.isnan(got.view(ml_dtypes.bfloat16).astype("float32")).all()


def test_the_first_of_a_pair_is_the_lower_half(evaluate):
    got = evaluate(lambda x: bf16.pair(x, x * T.float32(-2)), np.array([1.0, 3.0, 1 + 3 * 2**-8], "float32"), "int32")
    assert [hex(v) for v in got[:3].view("uint32")] == ["0xc0003f80", "0xc0c04040", "0xc0023f82"]


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_load_and_stored_follow_the_buffer(dtype, run_kernel, host_target):
    @T.prim_func(private=True, s_tir=True)
    def double(x: T.Buffer((LANES,), dtype), y: T.Buffer((LANES,), dtype)):
        T.func_attr({"tirx.noalias": True})
        for lane in T.vectorized(LANES):
            y[lane] = bf16.stored(y, bf16.load(x, lane) * T.float32(2))

    values = np.arange(LANES, dtype="float32") - 7
    x = values if dtype == "float32" else values.astype(ml_dtypes.bfloat16).view(dtype)
    out = run_kernel(double, [x], (LANES,), host_target, dtype)
    got = out if dtype == "float32" else out.view(ml_dtypes.bfloat16).astype("float32")
    np.testing.assert_array_equal(got, 2 * values)


def test_the_product_of_pairs(run_kernel, bf16_target):
    """c + a0 b0 + a1 b1 in whole numbers, so that no order of additions makes a difference."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        c: T.Buffer((LANES,), "float32"),
        a: T.Buffer((LANES,), "int32"),
        b: T.Buffer((LANES,), "int32"),
        y: T.Buffer((LANES,), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        with T.attr(T.int32(0), "pragma_import_llvm", bf16.DOT_LLVM):
            y[T.ramp(0, 1, LANES)] = bf16.dot(c[T.ramp(0, 1, LANES)], a[T.ramp(0, 1, LANES)], b[T.ramp(0, 1, LANES)])

    c, a, b = (np.random.default_rng(i).integers(-99, 100, (LANES, 2)).astype("float32") for i in range(3))
    pairs = [x.astype(ml_dtypes.bfloat16).view("int32")[:, 0] for x in (a, b)]
    got = run_kernel(kernel, [c[:, 0].copy(), *pairs], (LANES,), bf16_target)
    np.testing.assert_array_equal(got, c[:, 0] + (a * b).sum(1))
