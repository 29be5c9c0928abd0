"""What turbo_tvm relies on that TVM does not promise: each of these fails when TVM changes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend
from tvm.relax.frontend.torch import from_exported_program
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from turbo_tvm import tvm_compat


def test_onnx_converters_are_classes_with_versions():
    converters = tvm_compat.onnx_converters(onnx_frontend)
    assert {"MatMul", "Gather", "LayerNormalization"} <= set(converters)
    assert hasattr(converters["MatMul"], "get_converter")


def test_exported_programs_become_a_function_of_that_name():
    program = torch.export.export(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),))
    mod = from_exported_program(program, keep_params_as_input=True)
    assert [var.name_hint for var in mod.get_global_vars()] == [tvm_compat.EXPORTED]


@I.ir_module
class Small:
    @R.function
    def main(x: R.Tensor((2, 6), "float32")):
        with R.dataflow():
            exponential = R.exp(x)
            flat = R.reshape(exponential, R.shape([12]))
            negative = R.negative(flat)
            row = R.sum(exponential, axis=[1])
            R.output(negative, row)
        return (negative, row)


@pytest.fixture(scope="module")
def lowered() -> tvm.IRModule:
    t = relax.transform
    steps = [t.LegalizeOps(), t.AnnotateTIROpPattern(), t.RewriteDataflowReshape(), t.ToNonDataflow()]
    return tvm.transform.Sequential([*steps, t.RemovePurityChecking(), t.CallTIRRewrite()])(Small)


def test_kernels_say_whether_they_are_elementwise(lowered):
    said = {
        var.name_hint: tvm_compat.is_elementwise(dict(func.attrs))
        for var, func in lowered.functions_items()
        if isinstance(func, tvm.tirx.PrimFunc)
    }
    assert (said["tir_exp"], said["sum"]) == (True, False)


def test_reshapes_are_views_and_no_calls_of_kernels(lowered):
    values = [b.value for block in lowered["main"].body.blocks for b in block.bindings]
    views = [value for value in values if tvm_compat.is_view(value) and isinstance(value, relax.Call)]
    assert len(views) == 1
    assert tvm_compat.calls_outside(views[0]) is None


def test_a_call_of_a_kernel_outside_has_its_name():
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    of_ours = relax.Call(relax.ExternFunc("linear_8x8"), [x], ty_args=[x.ty])
    of_the_vm = relax.Call(relax.ExternFunc("vm.builtin.shape_of"), [x], ty_args=[relax.ShapeType(ndim=1)])
    assert tvm_compat.calls_outside(of_ours) == "linear_8x8"
    assert tvm_compat.calls_outside(of_the_vm) is None


def test_libraries_of_a_module_are_linked(tmp_path):
    """By an attribute of the module: what it calls by name is found in them."""

    @T.prim_func(s_tir=True)
    def outside(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
        T.func_attr({"global_symbol": "outside"})
        for i in range(4):
            y[i] = x[i] * T.float32(3)

    tvm.tirx.build(tvm.IRModule({"outside": outside}), target="llvm").write_to_file(str(tmp_path / "outside.o"))
    library = tvm.runtime.load_static_library(str(tmp_path / "outside.o"), ["outside"])
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.call_dps_packed("outside", [x], out_ty=x.ty))
        builder.emit_func_output(out)
    mod = builder.finalize().with_attr(tvm_compat.LINKED_LIBRARIES, [library])
    tvm.compile(mod, target="llvm").export_library(str(tmp_path / "all.so"))
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "all.so")), tvm.cpu())
    values = np.arange(4, dtype="float32")
    assert machine["main"](tvm.runtime.tensor(values)).numpy().tolist() == (3 * values).tolist()
