"""TVM's lowering for kernels that synchronise themselves, and for those that do not."""

from __future__ import annotations

import numpy as np
import pytest
import simt
import tvm
from cuda_kernels import TARGET, Gpu
from tvm import relax
from tvm.script import tirx as T

from turbo_tvm.compiler.cuda import lowering
from turbo_tvm.errors import CompileError
from turbo_tvm.schedules.cuda.script import kernel_attrs, sync_block


def reverse(attrs: dict, barrier: bool):
    """out[i] = x[63 - i], by way of shared memory."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((64,), "float32"), out: T.Buffer((64,), "float32")):
        T.func_attr(attrs)
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(64, thread="threadIdx.x"):
                with T.sblock("b"):
                    T.reads()
                    T.writes()
                    held = T.sblock_alloc_buffer((64,), "float32", scope="shared")
                    held[thread] = x[thread]
                    if barrier:
                        sync_block()
                    out[thread] = held[63 - thread]

    return kernel


@pytest.mark.parametrize("attrs", [kernel_attrs(64), {"tirx.noalias": True}])
def test_barriers_are_ours_or_tvms(attrs):
    ours = "turbo_tvm.synchronized" in attrs
    x = np.arange(64, dtype=np.float32)
    with simt.device() as device:
        gpu = Gpu(device)
        np.testing.assert_array_equal(gpu.run(gpu.build({"f": reverse(attrs, ours)}), "f", [x], x), x[::-1])
        assert gpu.counts().barriers == 1


def test_a_barrier_that_we_forget_is_not_added():
    x = np.zeros(64, np.float32)
    with simt.device() as device, pytest.raises(RuntimeError, match=r"race in shared memory|nothing has written"):
        gpu = Gpu(device)
        gpu.run(gpu.build({"f": reverse(kernel_attrs(64), False)}), "f", [x], x)


def test_what_has_no_schedule_gets_one_of_tvms():
    builder, rows = relax.BlockBuilder(), tvm.tirx.Var("m", "int64")
    x = relax.Var("x", relax.TensorType((rows, 40), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.exp(x)))
    with TARGET:
        mod = tvm.transform.Sequential([relax.transform.LegalizeOps(), lowering.schedule_others])(builder.get())
    (kernel,) = [f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    values = np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)
    with simt.device() as device:
        gpu = Gpu(device)
        out = gpu.run(gpu.build({"f": kernel}), "f", [values], values)
    np.testing.assert_allclose(out, np.exp(values), rtol=1e-5)


def test_a_module_without_cuda_code():
    @T.prim_func(s_tir=True)
    def nothing(x: T.Buffer((1,), "float32")):
        x[0] = T.float32(0)

    module = tvm.compile(tvm.IRModule({"nothing": nothing}), target="llvm").mod
    with pytest.raises(CompileError, match="no CUDA code"):
        lowering.source_of(module)
