"""Rotary positions against float64."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
import tvm
from cuda_kernels import DTYPES, allowed, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cuda.rotary import rotary, space
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

pytestmark = pytest.mark.xdist_group("cuda-norm")

POSITIONS = 40
SHAPES = {  # columns, wider, head_dim, dims that turn, spans
    "merged": (96 * 3, 0, 32, 32, ((0, 6),)),
    "partial": (40, 4, 10, 6, ((0, 2), (30, 1))),
    "everything": (32, 0, 16, 16, ((0, 2),)),
}


def operator(columns, head_dim, dims, spans, **formats):
    turn = {"head_dim": head_dim, "dims": dims, "positions": POSITIONS}
    return sized.rotary(CUDA_TILES, columns, spans, **turn, **formats)


def expected(x, ids, table, head_dim, dims, spans):
    out, half = x.copy(), dims // 2
    cosine, sine = table[ids[:, 0], None, :half].astype("f8"), table[ids[:, 0], None, half:].astype("f8")
    for first, heads in spans:
        for start in range(first, first + heads * head_dim, head_dim):
            low, high = x[..., start : start + half], x[..., start + half : start + dims]
            out[..., start : start + half] = low * cosine - high * sine
            out[..., start + half : start + dims] = high * cosine + low * sine
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_also_in_place(gpu, dtype):
    def kernel(columns, wider, head_dim, dims, spans):
        rows = Operand.rows(columns + wider, dtype)
        return rotary(operator(columns, head_dim, dims, spans, x=rows, out=rows), CUDA_TILES)

    module = gpu.build({name: kernel(*shape) for name, shape in SHAPES.items()})
    for name, (columns, wider, *turn) in SHAPES.items():
        rng = np.random.default_rng(0)
        x = stored(rng.normal(size=(17, 1, columns + wider)), dtype)
        ids = rng.integers(0, POSITIONS, (17, 1)).astype("int32")
        table = rng.normal(size=(POSITIONS, turn[1])).astype("float32")
        want = expected(loaded(x)[..., :columns], ids, table, *turn)
        found = gpu.run(module, name, [x, ids, table], x)
        assert (np.abs(loaded(found[..., :columns]) - want) <= allowed(want, dtype, 1e-6)).all()
        assert (np.ascontiguousarray(found[..., columns:]).view(np.uint8) == 0xFF).all()
        place = tvm.runtime.tensor(x, tvm.cuda(0))
        module[name](place, *(tvm.runtime.tensor(a, tvm.cuda(0)) for a in (ids, table)), place)
        np.testing.assert_array_equal(place.numpy()[..., :columns], found[..., :columns])


def test_extreme_settings(gpu, extremes):
    columns, _, *turn = SHAPES["partial"]
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(5, 1, columns)).astype("float32"), rng.normal(size=(POSITIONS, 6)).astype("float32")
    ids = rng.integers(0, POSITIONS, (5, 1)).astype("int32")
    turned = operator(columns, *turn)
    want, variants = expected(loaded(x), ids, table, *turn), extremes(space(turned, CUDA_TILES))
    module = gpu.build({f"f_{i}": rotary(turned, CUDA_TILES, (variant,)) for i, variant in enumerate(variants)})
    for i in range(len(variants)):
        found = gpu.run(module, f"f_{i}", [x, ids, table], x)
        assert (np.abs(found - want) <= allowed(want, "float32", 1e-6)).all()
