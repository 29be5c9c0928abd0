"""Attention against float64 over ragged batches, and what must not leak between sequences."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import tvm

from turbo_tvm.schedules.attention import attention
from turbo_tvm.schedules.tiles import NEON, CpuTiles, cpu_tiles

MAX_LENGTH = 512
RAGGED = (1, 2, 7, 11, 12, 13, 31, 32, 33, 128, 511, 512)
UNTOUCHED = 7.0


@dataclass(frozen=True)
class Heads:
    """heads x head_dim, with Q, K and V side by side in one buffer or in three."""

    heads: int
    head_dim: int
    merged: bool = True
    bias: bool = False

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def kernel(self, tiles: CpuTiles) -> tvm.tirx.PrimFunc:
        h = self.hidden
        operands = [(3 * h, 0), (3 * h, h), (3 * h, 2 * h)] if self.merged else [(h, 0)] * 3
        return attention(
            tiles,
            heads=self.heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            max_length=MAX_LENGTH,
            position_bias=self.bias,
            **dict(zip("qkv", operands, strict=True)),
        )


def query_tiles(lengths, queries: int) -> np.ndarray:
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    rows = [(first, begin, end) for begin, end in pairwise(bounds) for first in range(begin, end, queries)]
    return np.array(rows, "int32").reshape(-1, 3)


def expected(qkv: np.ndarray, lengths, shape: Heads, bias: np.ndarray | None) -> np.ndarray:
    out, begin = np.zeros((len(qkv), shape.hidden)), 0
    for length in lengths:
        rows = slice(begin, begin + length)
        q, k, v = qkv[rows].astype("float64").reshape(length, 3, shape.heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) * shape.head_dim**-0.5
        if bias is not None:
            scores += bias[:, np.arange(length) - np.arange(length)[:, None] + MAX_LENGTH - 1]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = weights @ v / weights.sum(-1, keepdims=True)
        out[rows] = context.transpose(1, 0, 2).reshape(length, -1)
        begin += length
    return out[:begin]


@pytest.fixture(params=["host_target", "avx2_target"])
def target(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def compiled():
    """`compiled(shape, target)`: `run(qkv, lengths, bias=None)` -> the output rows, surplus rows included."""
    tvm.get_global_func("runtime.config_threadpool")(1, 2)
    kernels = {}

    def compile_(shape: Heads, target: tvm.target.Target):
        tiles = cpu_tiles(target)
        if (shape, str(target)) not in kernels:
            module = tvm.IRModule({"kernel": shape.kernel(tiles).with_attr("global_symbol", "kernel")})
            kernels[shape, str(target)] = tvm.compile(module, target=target)["kernel"]

        def run(qkv: np.ndarray, lengths, bias: np.ndarray | None = None) -> np.ndarray:
            parts = [qkv] * 3 if shape.merged else np.split(qkv, 3, axis=1)
            surplus = -len(qkv) % tiles.row_tile
            parts = [np.pad(part, ((0, surplus), (0, 0))) for part in parts]
            out = np.full((len(qkv) + surplus, shape.hidden), UNTOUCHED, "float32")
            arrays = [part.reshape(-1, tiles.row_tile, part.shape[1]) for part in parts]
            arrays += [query_tiles(lengths, tiles.query_tile)] + ([] if bias is None else [bias])
            arrays.append(out.reshape(-1, tiles.row_tile, shape.hidden))
            arguments = [tvm.runtime.tensor(array) for array in arrays]
            kernels[shape, str(target)](*arguments)
            return arguments[-1].numpy().reshape(-1, shape.hidden)

        return run

    return compile_


def random_qkv(rows: int, shape: Heads, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 3 * shape.hidden), dtype="float32")


def random_bias(shape: Heads) -> np.ndarray | None:
    values = np.random.default_rng(1).standard_normal((shape.heads, 2 * MAX_LENGTH - 1), dtype="float32")
    return 3 * values if shape.bias else None


SHAPES = [
    Heads(12, 64),
    Heads(3, 32, merged=False, bias=True),
    Heads(1, 24),
    Heads(2, 36, merged=False),
    Heads(2, 7, bias=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_matches_float64(shape, target, compiled):
    lengths = np.random.default_rng(2).permutation(RAGGED)
    qkv, bias = random_qkv(sum(lengths), shape), random_bias(shape)
    out = compiled(shape, target)(qkv, lengths, bias)
    np.testing.assert_allclose(out[: len(qkv)], expected(qkv, lengths, shape, bias), rtol=1e-5, atol=5e-6)
    assert (out[len(qkv) :] == UNTOUCHED).all()


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_batches_that_end_with_the_buffer(batch, target, compiled):
    shape = Heads(3, 32, merged=False, bias=True)
    lengths = np.random.default_rng(batch).integers(1, 40, batch)
    lengths[-1] += -lengths.sum() % 12  # a multiple of every row tile: no surplus row follows
    qkv, bias = random_qkv(sum(lengths), shape), random_bias(shape)
    out = compiled(shape, target)(qkv, lengths, bias)
    np.testing.assert_allclose(out, expected(qkv, lengths, shape, bias), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("length", [*range(1, 70), 95, 96, 97, 500])
def test_every_short_length(length, target, compiled):
    shape = Heads(2, 36, merged=False)
    qkv = random_qkv(length, shape, seed=length)
    out = compiled(shape, target)(qkv, [length])
    np.testing.assert_allclose(out[:length], expected(qkv, [length], shape, None), rtol=1e-5, atol=5e-6)
    assert (out[length:] == UNTOUCHED).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("length", [1, 5, 13, 16, 17, 33, 100])
def test_other_sequences_do_not_leak(length, poison, target, compiled):
    shape = Heads(3, 32, merged=False, bias=True)
    lengths, bias = [9, length, 40], random_bias(shape)
    qkv = random_qkv(sum(lengths), shape)
    own = slice(9, 9 + length)
    others = np.ones(len(qkv), bool)
    others[own] = False
    run = compiled(shape, target)
    clean = run(qkv, lengths, bias)
    qkv[others] = poison
    np.testing.assert_array_equal(run(qkv, lengths, bias)[own], clean[own])


def test_alone_and_in_a_batch_give_the_same(target, compiled):
    shape, lengths = Heads(12, 64), [33, 12, 128, 1, 77]
    qkv = random_qkv(sum(lengths), shape)
    run = compiled(shape, target)
    together, begin = run(qkv, lengths), 0
    for length in lengths:
        rows = slice(begin, begin + length)
        np.testing.assert_allclose(run(qkv[rows], [length])[:length], together[rows], rtol=0, atol=1e-6)
        begin += length


def test_no_sequence_writes_nothing(target, compiled):
    shape = Heads(12, 64)
    assert (compiled(shape, target)(random_qkv(12, shape), []) == UNTOUCHED).all()


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_large_scores_stay_finite_and_pick_the_largest(magnitude, target, compiled):
    shape, length = Heads(2, 36, merged=False), 50
    qkv = random_qkv(length, shape)
    q, k, _ = np.split(qkv, 3, axis=1)
    q *= np.float32(magnitude**0.5)
    k *= np.float32(magnitude**0.5)
    out = compiled(shape, target)(qkv, [length])[:length]
    assert np.isfinite(out).all()
    # a score of 1e4 has an ulp of 1e-3, and the scale's factor log2(e) another
    np.testing.assert_allclose(out, expected(qkv, [length], shape, None), atol=2e-5 * magnitude)


@pytest.mark.parametrize("lowest", [-1e4, -1e9, np.finfo("float32").min])
def test_a_large_negative_bias_masks(lowest, target, compiled):
    shape, length = Heads(3, 32, merged=False, bias=True), 45
    qkv, bias = random_qkv(length, shape), random_bias(shape)
    bias[:, MAX_LENGTH:] = lowest  # causal: keys after the query
    out = compiled(shape, target)(qkv, [length], bias)[:length]
    np.testing.assert_allclose(out, expected(qkv, [length], shape, bias), rtol=1e-5, atol=5e-6)


def test_a_bias_that_masks_every_key_stays_finite(target, compiled):
    shape, length = Heads(3, 32, merged=False, bias=True), 20
    bias = np.full((shape.heads, 2 * MAX_LENGTH - 1), np.finfo("float32").min, "float32")
    assert np.isfinite(compiled(shape, target)(random_qkv(length, shape), [length], bias)[:length]).all()


def test_neon_uses_vector_fma_and_calls_no_libm(assembly, neon_target):
    assert cpu_tiles(neon_target) is NEON
    text = assembly(Heads(12, 64).kernel(NEON), neon_target)
    assert "fmla" in text and "prfm" in text
    assert "expf" not in text and "exp2f" not in text


def test_parameters_follow_the_position_bias():
    names = [[p.name for p in Heads(2, 32, bias=bias).kernel(NEON).params] for bias in (False, True)]
    assert names == [
        ["q_in", "k_in", "v_in", "query_tiles", "out"],
        ["q_in", "k_in", "v_in", "query_tiles", "bias", "out"],
    ]
