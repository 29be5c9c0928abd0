"""Barriers and shuffles as counted in the code, against the SIMT executor's counts of runs."""

from __future__ import annotations

import numpy as np
import pytest
import simt
import tvm
from cuda_kernels import TARGET, Gpu, stored

from turbo_tvm.compiler.cuda import lowering
from turbo_tvm.runtime import batch
from turbo_tvm.schedules.cpu.rows import RowFormat
from turbo_tvm.schedules.cuda.attention import attention
from turbo_tvm.schedules.cuda.linear import linear
from turbo_tvm.schedules.cuda.normalization import norm
from turbo_tvm.schedules.cuda.softmax import softmax
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

ROWS = 64


def counted(kernel):
    counts = {}
    module = tvm.IRModule({"f": kernel.with_attr("global_symbol", "f")})
    tvm.compile(module, target=TARGET, tir_pipeline=lowering.register(counts))
    return counts["f"]


@pytest.mark.parametrize("n", [7, 768, 4099])
@pytest.mark.parametrize("name", ["softmax", "norm"])
def test_rows(n, name):
    kernel = softmax(n=n) if name == "softmax" else norm(n=n, eps=1e-5)
    counts = counted(kernel)
    x = stored(np.random.default_rng(0).normal(size=(counts.rows * 4, 1, n)), "float32")
    vectors = [np.ones(n, np.float32)] * 2 if name == "norm" else []
    with simt.device() as device:
        gpu = Gpu(device)
        gpu.run(gpu.build({"f": kernel}), "f", [x, *vectors], x)
        run = gpu.counts()
    assert run.blocks == 4 and run.threads == 4 * counts.threads
    assert run.barriers == 4 * counts.barriers
    assert run.shuffles == 4 * counts.shuffles


def test_a_product_has_a_barrier_for_every_tile_of_k():
    counts = counted(linear(CUDA_TILES, k=96, n=64, x=RowFormat(96, "float16"), out=RowFormat(64, "float16")))
    assert (counts.rows, counts.threads, counts.barriers, counts.barriers_per_step) == (64, 128, 3, 0)


def test_attention_meets_at_every_step_of_its_keys():
    places = dict(zip("qkv", [(48, 0), (48, 16), (48, 32)], strict=True))
    formats = {"x": RowFormat(48, "float16"), "out": RowFormat(16, "float16")}
    kernel = attention(CUDA_TILES, heads=1, head_dim=16, scale=0.25, max_length=256, **places, **formats)
    counts = counted(kernel)
    assert (counts.barriers, counts.barriers_per_step) == (0, 2)
    x = stored(np.random.default_rng(0).normal(size=(256, 1, 48)), "float16")
    tiles = batch.query_tiles(batch.boundaries([256]), 64)
    with simt.device() as device:
        gpu = Gpu(device)
        gpu.run(gpu.build({"f": kernel}), "f", [x, x, x, tiles], np.zeros((256, 1, 16), np.float16))
        run = gpu.counts()
    blocks, steps = 256 // 64, 256 // 64
    assert run.barriers == blocks * steps * counts.barriers_per_step
    assert run.shuffles == blocks * (counts.shuffles + steps * counts.shuffles_per_step)
