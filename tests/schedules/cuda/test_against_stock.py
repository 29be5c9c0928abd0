"""Counted in one executor: the batch reduction against the schedule that TVM itself gives the same operator."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import simt
import sized_operators as sized
import tvm
from cuda_kernels import LENGTHS, TARGET, stored
from tvm import relax

from turbo_tvm.compiler.cuda import lowering
from turbo_tvm.ops.operand import Operand
from turbo_tvm.schedules.cuda.normalization import norm
from turbo_tvm.schedules.cuda.softmax import softmax
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

ROWS = 64


def stock(operator: str, n: int, dtype: str) -> dict[str, tvm.tirx.PrimFunc]:
    """TVM's kernels for it, on any number of rows: softmax, layer norm, or a sum and its layer norm."""
    builder, rows = relax.BlockBuilder(), tvm.tirx.Var("m", "int64")
    x, residual = (relax.Var(name, relax.TensorType((rows, n), dtype)) for name in ("x", "residual"))
    gamma, beta = (relax.Var(name, relax.TensorType((n,), dtype)) for name in ("gamma", "beta"))
    with builder.function("main", [x, residual, gamma, beta]):
        value = builder.emit(relax.op.add(x, residual)) if operator == "add_norm" else x
        if operator == "softmax":
            builder.emit_func_output(builder.emit(relax.op.nn.softmax(value)))
        else:
            builder.emit_func_output(builder.emit(relax.op.nn.layer_norm(value, gamma, beta, axes=[-1])))
    t = relax.transform
    steps = [t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FuseOps(), t.FuseTIR(), lowering.schedule_others]
    with TARGET:
        mod = tvm.transform.Sequential(steps)(builder.get())
    return {var.name_hint: f for var, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}


def ours(operator: str, n: int, dtype: str) -> tvm.tirx.PrimFunc:
    """The one kernel that we have for it."""
    rows = Operand.rows(n, dtype)
    if operator == "softmax":
        return softmax(sized.softmax(CUDA_TILES, n, x=rows, out=rows), CUDA_TILES)
    residual = rows if operator == "add_norm" else False
    normed = sized.norm(CUDA_TILES, n, eps=1e-5, residual=residual, vectors=dtype, x=rows, out=rows)
    return norm(normed, CUDA_TILES)


@pytest.fixture(scope="module")
def modules(gpu):
    """By operator and dtype: TVM's names by row length, its kernels, and ours; compiling them together is quicker."""
    made = {}

    def of(operator, dtype):
        if (operator, dtype) not in made:
            theirs = {n: stock(operator, n, dtype) for n in LENGTHS}
            names = {n: {name: f"{name}_of_{n}" for name in kernels} for n, kernels in theirs.items()}
            together = {names[n][name]: f for n, kernels in theirs.items() for name, f in kernels.items()}
            made[operator, dtype] = (
                names,
                gpu.build(together, stock=True),
                gpu.build({f"ours_{n}": ours(operator, n, dtype) for n in LENGTHS}),
            )
        return made[operator, dtype]

    return of


def count(gpu, modules, operator: str, n: int, dtype: str) -> tuple[simt.Counts, simt.Counts]:
    """TVM's counts and ours, for results that agree."""
    names, theirs, mine = modules(operator, dtype)
    rng = np.random.default_rng(0)
    x, residual = (stored(rng.normal(size=(ROWS, n)), dtype) for _ in range(2))
    vectors = [stored(rng.normal(size=n), dtype) for _ in range(2)] if operator != "softmax" else []
    total = simt.Counts(**{f.name: 0 for f in fields(simt.Counts)})
    value = x
    for name, full in sorted(names[n].items()):  # the sum comes first, by name and by need
        inputs = [x, residual] if "norm" not in name and operator == "add_norm" else [value, *vectors]
        value = gpu.run(theirs, full, inputs, x)
        total = total + gpu.counts()
    shape = (ROWS, 1, n)
    added = [residual.reshape(shape)] if operator == "add_norm" else []
    found = gpu.run(mine, f"ours_{n}", [x.reshape(shape), *added, *vectors], x.reshape(shape))
    np.testing.assert_allclose(found.reshape(x.shape).astype("f8"), value.astype("f8"), rtol=0.02, atol=0.02)
    return total, gpu.counts()


@pytest.mark.slow
@pytest.mark.xdist_group("cuda-stock")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("operator", ["softmax", "norm", "add_norm"])
@pytest.mark.parametrize("n", LENGTHS)
def test_fewer_barriers_shuffles_and_transactions(gpu, modules, operator, n, dtype):
    theirs, mine = count(gpu, modules, operator, n, dtype)
    assert mine.barrier_arrivals <= theirs.barrier_arrivals / 4
    assert mine.shuffles <= theirs.shuffles
    assert mine.global_sectors <= theirs.global_sectors / 2
    # One row of a single element is one access of a lane either way.
    assert mine.global_requests <= theirs.global_requests * (1 / 2 if n > 1 else 1)
    if n <= 1024:
        assert mine.barriers == 0
