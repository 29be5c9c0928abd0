"""Norms against float64."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import DTYPES, LENGTHS, ROWS, allowed, loaded, stored

from turbo_tvm.schedules.cuda.normalization import KINDS, norm, space
from turbo_tvm.schedules.cuda.reduction import row_form, vector_width
from turbo_tvm.schedules.cpu.rows import RowFormat

pytestmark = pytest.mark.xdist_group("cuda-norm")

EPS = 1e-12


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
            options = {"eps": EPS, "residual": True, "bias": True, "vectors": dtype}
            formats = {n: dict.fromkeys(("x", "extra", "out"), RowFormat(n, dtype)) for n in LENGTHS}
            made[dtype] = gpu.build({f"norm_{n}": norm(n=n, **options, **formats[n]) for n in LENGTHS})
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
    formats = {"x": RowFormat(n, dtype), "out": RowFormat(n, dtype)}
    module = gpu.build({"f": norm(n=n, eps=eps, kind=kind, vectors=dtype, **formats)})
    x = stored(np.random.default_rng(0).normal(size=(9, 1, n)), dtype)
    _, gamma, beta = vectors(n, dtype)
    taken = {"layer": [gamma, beta], "rms": [gamma], "l2": []}[kind]
    out = gpu.run(module, "f", [x, *taken], x)
    check(out, loaded(x), loaded(gamma) if taken else None, loaded(beta), dtype, kind, eps)


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_formats_and_wider_rows(gpu, x, out):
    n = 100
    formats = {"x": RowFormat(104, x), "extra": RowFormat(n, out), "out": RowFormat(120, out)}
    module = gpu.build({"f": norm(n=n, eps=EPS, residual=True, **formats)})
    values = stored(np.random.default_rng(0).normal(size=(9, 1, 104)), x)
    extra = stored(np.random.default_rng(1).normal(size=(9, 1, n)), out)
    _, gamma, beta = vectors(n, "float32")
    found = gpu.run(module, "f", [values, extra, gamma, beta], np.zeros((9, 1, 120), out))
    check(found[..., :n], loaded(values[..., :n]) + loaded(extra), gamma.astype("f8"), beta.astype("f8"), out)
    assert (np.ascontiguousarray(found[..., n:]).view(np.uint8) == 0xFF).all()


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "threads"), [(64, 4), (200, 32), (300, 64), (900, 256)])
def test_every_form(gpu, rows, n, threads):
    form = row_form(n, vector_width(n, RowFormat(n)), rows=rows, threads=threads)
    x, (bias, gamma, beta) = adversarial(21, n, "float32"), vectors(n, "float32")
    module = gpu.build({"f": norm(n=n, eps=EPS, bias=True, form=form)})
    out = gpu.run(module, "f", [x, bias, gamma, beta], x)
    check(out, loaded(x) + bias, gamma.astype("f8"), beta.astype("f8"), "float32")
    assert gpu.counts().barriers == (0 if threads <= 32 else 2 * -(-21 // rows))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_too_long_for_registers(gpu, kind):
    n = 70_001
    x = stored(np.random.default_rng(0).normal(5, 1, size=(3, 1, n)), "float32")
    _, gamma, beta = vectors(n, "float32")
    taken = {"layer": [gamma, beta], "rms": [gamma], "l2": []}[kind]
    out = gpu.run(gpu.build({"f": norm(n=n, eps=EPS, kind=kind)}), "f", [x, *taken], x)
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
    module = gpu.build({"f": norm(n=n, eps=EPS, residual=True)})
    tensors = [tvm.runtime.tensor(a, tvm.cuda(0)) for a in (x, residual, gamma, beta)]
    module["f"](*tensors, tensors[1])
    check(tensors[1].numpy(), loaded(x) + loaded(residual), gamma.astype("f8"), beta.astype("f8"), "float32")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="unknown norm 'batch'"):
        norm(n=8, eps=EPS, kind="batch")


@pytest.mark.parametrize(("n", "dtype"), [(300, "float32"), (1100, "float16")])
def test_extreme_settings(gpu, extremes, n, dtype):
    rows = dict.fromkeys(("x", "extra", "out"), RowFormat(n, dtype))
    options = {"n": n, "eps": EPS, "residual": True, "vectors": dtype, **rows}
    variants = extremes(space(**options))
    module = gpu.build({f"f_{i}": norm(variants=(variant,), **options) for i, variant in enumerate(variants)})
    x, residual, (_, gamma, beta) = adversarial(21, n, dtype), adversarial(21, n, dtype, seed=1), vectors(n, dtype)
    v = loaded(x) + loaded(residual)
    v[np.abs(v) < 1e-30] = 0
    with gpu.device.uncounted():
        for i in range(len(variants)):
            out = gpu.run(module, f"f_{i}", [x, residual, gamma, beta], x)
            check(out, v, loaded(gamma), loaded(beta), dtype)
