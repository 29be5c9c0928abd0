"""Ragged attention against float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import sized_operators as sized
from cuda_kernels import DTYPES, ULP, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.runtime import batch
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cuda.attention import MAX_HEAD_DIM, attention, space
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

pytestmark = pytest.mark.xdist_group("cuda-attention")


def kernel(
    heads,
    head_dim,
    dtype,
    longest,
    *,
    bias=False,
    out=None,
    scale=None,
    merged=True,
    wider=0,
    kv_heads=None,
    window=None,
    variants=(),
):
    inner = heads * head_dim
    widths = [inner, *[(kv_heads or heads) * head_dim] * 2]
    operator = sized.attention(
        CUDA_TILES,
        heads,
        head_dim,
        longest,
        columns=sized.qkv_columns(widths, merged=merged, wider=wider),
        scale=scale,
        position_bias=bias,
        kv_heads=kv_heads,
        window=window,
        dtype=dtype,
        out=Operand.rows(inner, out or dtype),
    )
    return attention(operator, CUDA_TILES, variants)


def check(gpu, heads, head_dim, dtype, lengths, *, change=lambda q, k, v: None, **options):
    inner, longest = heads * head_dim, max(lengths)
    merged, wider, biased = options.get("merged", True), options.get("wider", 0), options.get("bias", False)
    scale, out_type = options.get("scale") or head_dim**-0.5, options.get("out") or dtype
    rng, limits = np.random.default_rng(0), batch.cu_seqlens_of(list(lengths))
    shared, window = heads // (options.get("kv_heads") or heads), options.get("window")
    q, k, v = (rng.normal(size=(sum(lengths), size)) for size in (inner, inner // shared, inner // shared))
    change(q, k, v)
    parts = [stored(part, dtype) for part in (q, k, v)]
    spare = np.full((len(q), wider), 0x7E, np.uint16 if dtype != "float32" else np.uint32).view(parts[0].dtype)
    if merged:
        whole = np.concatenate([*parts, spare], axis=1)[:, None]
        rows = [whole] * 3
    else:
        rows = [np.concatenate([part, spare], axis=1)[:, None] for part in parts]
    table = rng.normal(size=(heads, 2 * longest - 1)).astype(np.float32)
    tiles = batch.query_tiles(limits, CUDA_TILES.query_tile, longest_first=True)
    module = gpu.build({"f": kernel(heads, head_dim, dtype, longest, **options)})
    inputs = [*rows, tiles, *([table] if biased else [])]
    found = loaded(gpu.run(module, "f", inputs, np.zeros((len(q), 1, inner), out_type)))[:, 0]
    q, k, v = (loaded(part) for part in parts)
    for begin, end in pairwise(limits):
        index = np.arange(end - begin)
        for head in range(heads):
            at = np.s_[begin:end, head * head_dim : (head + 1) * head_dim]
            kv_at = np.s_[begin:end, head // shared * head_dim : (head // shared + 1) * head_dim]
            scores = q[at] @ k[kv_at].T * scale
            if biased:
                scores += table[head][index[None] - index[:, None] + longest - 1]
            if window is not None:
                scores = np.where(np.abs(index[None] - index[:, None]) > window, -1e9, scores)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            want = weights @ v[kv_at]
            # The weights are rounded to the operands' format; scores are sums of head_dim products in fp32.
            rounded = 0 if dtype == "float32" else ULP[dtype]
            error = (rounded + 2e-6 + 5e-7 * np.abs(scores[weights > 0]).max()) * (weights @ np.abs(v[kv_at]))
            error += ULP[out_type] / 2 * np.abs(want) + 1e-7
            assert (np.abs(found[at] - want) <= error).all()
    return gpu.counts()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_ragged_batches_match_float64(gpu, dtype, head_dim):
    check(gpu, 2, head_dim, dtype, (1, 7, 31, 32, 33, 64, 127, 128, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [500, 768, 1024, 3072, 4099])
def test_long_sequences(gpu, dtype, length):
    with gpu.device.uncounted():
        check(gpu, 1, 16, dtype, (length, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 20, 80, 100])
def test_heads_of_any_width(gpu, dtype, head_dim):
    check(gpu, 3, head_dim, dtype, (65, 1, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{"merged": False}, {"wider": 8}, {"bias": True}, {"scale": 1.0}, {"out": "float32"}]
)
def test_options(gpu, dtype, options):
    check(gpu, 2, 32, dtype, (70, 3, 33), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 5, 70])
def test_windows_and_grouped_heads(gpu, dtype, window):
    check(gpu, 4, 32, dtype, (200, 3, 65), kv_heads=2, window=window, merged=window > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 3, 17, 64])
def test_many_short_sequences(gpu, dtype, batch_size):
    check(gpu, 1, 32, dtype, [1 + i % 5 for i in range(batch_size)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart(gpu, dtype):
    """Each query has one key that outweighs all others by e^40, met early by some and late by others."""

    def change(q, k, v):
        q[:] = k[:] = 0
        q[:, 0] = 1
        k[::50, 0] = 160

    check(gpu, 1, 16, dtype, (200, 51, 7), change=change)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_all_alike(gpu, dtype):
    def change(q, k, v):
        q[:] = 0

    check(gpu, 1, 16, dtype, (130, 1), change=change)


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
def test_counts(gpu, dtype):
    """Products in tensor cores, no score in global memory: reads and writes are those of q, k, v and the output."""
    counts = check(gpu, 1, 64, dtype, (128,))
    assert counts.mma == 2 * (128 // 16) ** 2 * (64 // 16)
    queries, tiles = 128 * 64 * 2, 2
    assert counts.global_store_bytes == queries
    assert counts.global_load_bytes <= queries + tiles * 2 * queries + 4096  # each block reads all keys and values


def test_heads_too_wide():
    with pytest.raises(ValueError, match=f"head of {MAX_HEAD_DIM + 1} columns; the GPU's kernel takes {MAX_HEAD_DIM}"):
        kernel(1, MAX_HEAD_DIM + 1, "float32", 8)


def space_of(head_dim, dtype):
    places = [(3 * head_dim, i * head_dim) for i in range(3)]
    return space(sized.attention(CUDA_TILES, 1, head_dim, 8, columns=places, dtype=dtype), CUDA_TILES)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_extreme_settings(gpu, extremes, dtype):
    for variant in extremes(space_of(20, dtype)):
        check(gpu, 1, 20, dtype, (130, 1, 64), window=40, variants=(variant,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "most"), [(64, 64), (80, None), (128, 32)])
def test_as_many_keys_as_there_is_room_for(dtype, head_dim, most):
    most = most or (64 if dtype == "float32" else 32)
    keys = space_of(head_dim, dtype).knobs[0]
    assert keys.values[-1] == most
    if most < 64:
        with pytest.raises(ValueError, match="knob keys cannot be 64; it is one of 16, 32"):
            kernel(1, head_dim, dtype, 8, variants=(Variant((("keys", 64),)),))
