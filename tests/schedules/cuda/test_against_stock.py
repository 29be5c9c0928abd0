"""Counted in one executor: the batch reduction against the schedule that TVM itself gives the same operator."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import simt
import tvm
from cuda_kernels import LENGTHS, TARGET, stored
from tvm import relax

from turbo_tvm import cuda_lowering
from turbo_tvm.schedules.cuda.normalization import norm
from turbo_tvm.schedules.cuda.softmax import softmax
from turbo_tvm.schedules.rows import RowFormat

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
    steps = [t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FuseOps(), t.FuseTIR(), cuda_lowering.schedule_others]
    with TARGET:
        mod = tvm.transform.Sequential(steps)(builder.get())
    return {var.name_hint: f for var, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}


def count(gpu, operator: str, n: int, dtype: str) -> tuple[simt.Counts, simt.Counts]:
    """TVM's counts and ours."""
    rng = np.random.default_rng(0)
    x, residual = (stored(rng.normal(size=(ROWS, n)), dtype) for _ in range(2))
    vectors = [stored(rng.normal(size=n), dtype) for _ in range(2)]
    theirs = stock(operator, n, dtype)
    module = gpu.build(theirs, stock=True)
    total = simt.Counts(**{f.name: 0 for f in fields(simt.Counts)})
    if operator == "add_norm":
        (first,) = (name for name in theirs if "add" in name)
        total_x = gpu.run(module, first, [x, residual], x)
        total = gpu.counts()
    else:
        total_x = x
    last = next(name for name in theirs if "add" not in name)
    want = gpu.run(module, last, [total_x, *(vectors if operator != "softmax" else [])], x)
    total = total + gpu.counts()

    rows = dict.fromkeys(("x", "out"), RowFormat(n, dtype))
    shape = (ROWS, 1, n)
    if operator == "softmax":
        kernel, inputs = softmax(n=n, **rows), [x.reshape(shape)]
    else:
        added = operator == "add_norm"
        kernel = norm(n=n, eps=1e-5, residual=added, vectors=dtype, extra=RowFormat(n, dtype), **rows)
        inputs = [x.reshape(shape), *([residual.reshape(shape)] if added else []), *vectors]
    found = gpu.run(gpu.build({"ours": kernel}), "ours", inputs, x.reshape(shape))
    np.testing.assert_allclose(found.reshape(x.shape).astype("f8"), want.astype("f8"), rtol=0.02, atol=0.02)
    return total, gpu.counts()


@pytest.mark.xdist_group("cuda-stock")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("operator", ["softmax", "norm", "add_norm"])
@pytest.mark.parametrize("n", LENGTHS)
def test_fewer_barriers_shuffles_and_transactions(gpu, operator, n, dtype):
    theirs, ours = count(gpu, operator, n, dtype)
    assert ours.barrier_arrivals <= theirs.barrier_arrivals / 4
    assert ours.shuffles <= theirs.shuffles
    assert ours.global_sectors <= theirs.global_sectors / 2
    # One row of a single element is one access of a lane either way.
    assert ours.global_requests <= theirs.global_requests * (1 / 2 if n > 1 else 1)
    if n <= 1024:
        assert ours.barriers == 0
