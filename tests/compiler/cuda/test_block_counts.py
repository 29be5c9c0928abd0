"""Barriers and shuffles as counted in the code, against the SIMT executor's counts of runs."""

from __future__ import annotations

import numpy as np
import pytest
import simt
import sized_operators as sized
import tvm
from cuda_kernels import TARGET, Gpu, stored

from turbo_tvm.compiler.cuda import lowering
from turbo_tvm.ops.operand import Operand
from turbo_tvm.runtime import batch
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
    made = {"softmax": (softmax, sized.softmax), "norm": (norm, sized.norm)}
    schedule, operator = made[name]
    kernel = schedule(operator(CUDA_TILES, n), CUDA_TILES)
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
    formats = {"x": Operand.rows(96, "float16"), "out": Operand.rows(64, "float16")}
    counts = counted(linear(sized.linear(CUDA_TILES, 96, 64, **formats), CUDA_TILES))
    assert (counts.rows, counts.threads, counts.barriers, counts.barriers_per_step) == (64, 128, 3, 0)


def test_attention_meets_at_every_step_of_its_keys():
    places, formats = ((48, 0), (48, 16), (48, 32)), {"dtype": "float16", "out": Operand.rows(16, "float16")}
    kernel = attention(sized.attention(CUDA_TILES, 1, 16, 256, columns=places, **formats), CUDA_TILES)
    counts = counted(kernel)
    assert (counts.barriers, counts.barriers_per_step) == (0, 2)
    x = stored(np.random.default_rng(0).normal(size=(256, 1, 48)), "float16")
    tiles = batch.query_tiles(batch.cu_seqlens_of([256]), 64)
    with simt.device() as device:
        gpu = Gpu(device)
        gpu.run(gpu.build({"f": kernel}), "f", [x, x, x, tiles], np.zeros((256, 1, 16), np.float16))
        run = gpu.counts()
    blocks, steps = 256 // 64, 256 // 64
    assert run.barriers == blocks * steps * counts.barriers_per_step
    assert run.shuffles == blocks * (counts.shuffles + steps * counts.shuffles_per_step)
