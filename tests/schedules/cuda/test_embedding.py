"""Embedding against float64."""

from __future__ import annotations

import numpy as np
import pytest
import sized_operators as sized
from cuda_kernels import DTYPES, allowed, loaded, stored

from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cuda.embedding import embedding, space
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

SIZES = (1000, 2, 300)
EPS = 1e-12


@pytest.mark.xdist_group("cuda-embedding")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("hidden", "tables"), [(768, 3), (33, 1), (100, 2), (1, 1), (4099, 2)])
def test_matches_float64(gpu, dtype, normalised, hidden, tables):
    rng = np.random.default_rng(0)
    held = [stored(rng.normal(size=(size, hidden)), dtype) for size in SIZES[:tables]]
    gamma, beta = (stored(rng.normal(size=hidden), dtype) for _ in range(2))
    options = {"norm_eps": EPS if normalised else None, "table_type": dtype, "vectors": dtype}
    operator = sized.embedding(CUDA_TILES, hidden, tables, out=Operand.rows(hidden, dtype), **options)
    module = gpu.build({"f": embedding(operator, CUDA_TILES)})
    for m in (1, 3, 17, 64):
        ids = [rng.integers(0, size, (m, 1), dtype=np.int32) for size in SIZES[:tables]]
        inputs = [*ids, *held, *([gamma, beta] if normalised else [])]
        found = loaded(gpu.run(module, "f", inputs, np.zeros((m, 1, hidden), dtype)))[:, 0]
        want = sum(loaded(table)[i[:, 0]] for i, table in zip(ids, held, strict=True))
        error = 1e-6
        if normalised:
            spread = np.sqrt(want.var(-1, keepdims=True) + EPS)
            centred = want - want.mean(-1, keepdims=True)
            # The sum is rounded to 1e-7; a row of one column has no spread, and is beta to the last bit.
            error = np.where(spread > 1e-5, 3e-7 * (np.abs(want).max() / spread), 0) * np.abs(loaded(gamma)) + 1e-6
            want = centred / spread * loaded(gamma) + loaded(beta)
        assert (np.abs(found - want) <= allowed(want, dtype, error)).all()


@pytest.mark.parametrize("tables", [0, 4])
def test_too_many_tables(tables):
    with pytest.raises(ValueError, match="1 to 3 are supported"):
        embedding(sized.embedding(CUDA_TILES, 8, tables), CUDA_TILES)


@pytest.mark.xdist_group("cuda-embedding")
def test_extreme_settings(gpu, extremes):
    hidden, m, rng = 300, 21, np.random.default_rng(0)
    operator = sized.embedding(CUDA_TILES, hidden, 2, table_type="float16")
    tables = [rng.normal(size=(size, hidden)).astype("float16") for size in SIZES[:2]]
    ids = [rng.integers(0, size, (m, 1), dtype=np.int32) for size in SIZES[:2]]
    want = sum(loaded(table)[i] for i, table in zip(ids, tables, strict=True))
    variants = extremes(space(operator, CUDA_TILES))
    module = gpu.build({f"f_{i}": embedding(operator, CUDA_TILES, (variant,)) for i, variant in enumerate(variants)})
    with gpu.device.uncounted():
        for i in range(len(variants)):
            found = gpu.run(module, f"f_{i}", [*ids, *tables], np.zeros((m, 1, hidden), np.float32))
            assert (np.abs(found - want) <= allowed(want, "float32", 1e-6)).all()
