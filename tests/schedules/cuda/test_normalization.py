"""Norms against float64."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
from cuda_kernels import DTYPES, LENGTHS, ROWS, allowed, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cuda.normalization import l2_normalize, norm, space
from turbo_tvm.schedules.cuda.reduction import row_form, vector_width
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

pytestmark = pytest.mark.xdist_group("cuda-norm")

EPS = 1e-12
KINDS = ("layer", "rms", "l2")


def operator(n, kind="layer", *, eps=EPS, x=None, out=None, **options):
    if kind == "l2":
        return sized.l2_normalize(CUDA_TILES, n, eps=eps, x=x, out=out)
    return sized.norm(CUDA_TILES, n, eps=eps, rms=kind == "rms", x=x, out=out, **options)


def kernel(n, kind="layer", *, how=None, **options):
    """how: further arguments of the schedule."""
    schedule = l2_normalize if kind == "l2" else norm
    return schedule(operator(n, kind, **options), CUDA_TILES, **how or {})


def expected(v, gamma=None, beta=None, kind="layer", eps=EPS):
    if kind == "l2":
        return v / np.maximum(np.sqrt((v * v).sum(-1, keepdims=True)), eps)
    if kind == "rms":
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + eps) * gamma
    centred = v - v.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * gamma + beta


def adversarial(rows: int, n: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Rows that are hard in ways of their own, then random ones."""
    x = np.random.default_rng(seed).normal(0, 1, (rows, 1, n))
    hard = [
        lambda row: row + (300 if dtype == "uint16" else 2000),  # |mean| >> std
        lambda row: row * 0 + 3.25,  # all alike: beta
        lambda row: row * 1e-40,  # denormal
        lambda row: row * 1e3,
        lambda row: np.where(np.arange(n) == n - 1, 100.0, row),
    ]
    for i, change in enumerate(hard[: max(0, rows - 1)]):
        x[i] = change(x[i])
    return stored(x, dtype)


def vectors(n: int, dtype: str) -> list[np.ndarray]:
    """bias, gamma, beta."""
    rng = np.random.default_rng(7)
    return [stored(rng.normal(size=n), dtype) for _ in range(3)]


def check(out, v, gamma, beta, dtype, kind="layer", eps=EPS):
    """v: the sum that was normalised, in float64. fp32 loses 1e-7 of the largest summand, before dividing by std."""
    want = expected(v, gamma, beta, kind, eps)
    spread = np.sqrt(v.var(-1, keepdims=True) + eps) if kind == "layer" else 1.0
    size = np.abs(v).max(-1, keepdims=True) if kind == "layer" else np.abs(want)
    gain = np.abs(gamma) if gamma is not None else 1.0
    error = 3e-7 * size / spread * gain + 2e-6 * np.abs(want) + 1e-7 * np.abs(want - (0 if beta is None else beta))
    assert (np.abs(loaded(out) - want) <= allowed(want, dtype, error)).all()


@pytest.fixture(scope="module")
def kernels(gpu):
    """By dtype: x + residual + bias, normalised, for all row lengths."""
    made = {}

    def of(dtype):
        if dtype not in made:
            options, formats = {"vectors": dtype, "how": {"bias": True}}, ("x", "residual", "out")
            rows = {n: dict.fromkeys(formats, Operand.rows(n, dtype)) for n in LENGTHS}
            made[dtype] = gpu.build({f"norm_{n}": kernel(n, **options, **rows[n]) for n in LENGTHS})
        return made[dtype]

    return of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_residual_bias_and_norm_match_float64(gpu, kernels, dtype, n):
    bias, gamma, beta = vectors(n, dtype)
    for rows in ROWS:
        x, residual = adversarial(rows, n, dtype), adversarial(rows, n, dtype, seed=1)
        out = gpu.run(kernels(dtype), f"norm_{n}", [x, residual, bias, gamma, beta], x)
        v = loaded(x) + loaded(residual) + loaded(bias)
        v[np.abs(v) < 1e-30] = 0  # denormal sums are beta either way
        check(out, v, loaded(gamma), loaded(beta), dtype)
        if n <= 1024:
            assert gpu.counts().barriers == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds(gpu, kind, dtype):
    n, eps = 100, 1e-5
    formats = {"x": Operand.rows(n, dtype), "out": Operand.rows(n, dtype)}
    module = gpu.build({"f": kernel(n, kind, eps=eps, vectors=dtype, **formats)})
    x = stored(np.random.default_rng(0).normal(size=(9, 1, n)), dtype)
    _, gamma, beta = vectors(n, dtype)
    taken = {"layer": [gamma, beta], "rms": [gamma], "l2": []}[kind]
    out = gpu.run(module, "f", [x, *taken], x)
    check(out, loaded(x), loaded(gamma) if taken else None, loaded(beta), dtype, kind, eps)


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_formats_and_wider_rows(gpu, x, out):
    n = 100
    formats = {"x": Operand.rows(104, x), "residual": Operand.rows(n, out), "out": Operand.rows(120, out)}
    module = gpu.build({"f": kernel(n, **formats)})
    values = stored(np.random.default_rng(0).normal(size=(9, 1, 104)), x)
    extra = stored(np.random.default_rng(1).normal(size=(9, 1, n)), out)
    _, gamma, beta = vectors(n, "float32")
    found = gpu.run(module, "f", [values, extra, gamma, beta], np.zeros((9, 1, 120), out))
    check(found[..., :n], loaded(values[..., :n]) + loaded(extra), gamma.astype("f8"), beta.astype("f8"), out)
    assert (np.ascontiguousarray(found[..., n:]).view(np.uint8) == 0xFF).all()


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "threads"), [(64, 4), (200, 32), (300, 64), (900, 256)])
def test_every_form(gpu, rows, n, threads):
    form = row_form(n, vector_width(n, Operand.rows(n)), rows=rows, threads=threads)
    x, (bias, gamma, beta) = adversarial(21, n, "float32"), vectors(n, "float32")
    module = gpu.build({"f": kernel(n, how={"bias": True, "form": form})})
    out = gpu.run(module, "f", [x, bias, gamma, beta], x)
    check(out, loaded(x) + bias, gamma.astype("f8"), beta.astype("f8"), "float32")
    assert gpu.counts().barriers == (0 if threads <= 32 else 2 * -(-21 // rows))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_too_long_for_registers(gpu, kind):
    n = 70_001
    x = stored(np.random.default_rng(0).normal(5, 1, size=(3, 1, n)), "float32")
    _, gamma, beta = vectors(n, "float32")
    taken = {"layer": [gamma, beta], "rms": [gamma], "l2": []}[kind]
    out = gpu.run(gpu.build({"f": kernel(n, kind)}), "f", [x, *taken], x)
    check(out, loaded(x), gamma.astype("f8") if taken else None, beta.astype("f8"), "float32", kind)


def test_in_place_of_an_input(gpu):
    """`kernels.overwritable` lets the memory planner give the result an input's place."""
    import tvm

    n = 300
    x, residual, (_, gamma, beta) = (
        adversarial(17, n, "float32"),
        adversarial(17, n, "float32", 1),
        vectors(n, "float32"),
    )
    module = gpu.build({"f": kernel(n, residual=True)})
    tensors = [tvm.runtime.tensor(a, tvm.cuda(0)) for a in (x, residual, gamma, beta)]
    module["f"](*tensors, tensors[1])
    check(tensors[1].numpy(), loaded(x) + loaded(residual), gamma.astype("f8"), beta.astype("f8"), "float32")


@pytest.mark.parametrize(("n", "dtype"), [(300, "float32"), (1100, "float16")])
def test_extreme_settings(gpu, extremes, n, dtype):
    options = {**dict.fromkeys(("x", "residual", "out"), Operand.rows(n, dtype)), "vectors": dtype}
    variants = extremes(space(operator(n, **options), CUDA_TILES))
    module = gpu.build({f"f_{i}": kernel(n, how={"variants": (v,)}, **options) for i, v in enumerate(variants)})
    x, residual, (_, gamma, beta) = adversarial(21, n, dtype), adversarial(21, n, dtype, seed=1), vectors(n, dtype)
    v = loaded(x) + loaded(residual)
    v[np.abs(v) < 1e-30] = 0
    with gpu.device.uncounted():
        for i in range(len(variants)):
            out = gpu.run(module, f"f_{i}", [x, residual, gamma, beta], x)
            check(out, v, loaded(gamma), loaded(beta), dtype)
