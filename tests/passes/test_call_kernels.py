"""Operators become calls of kernels outside the module, and equal kernels are one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.ops import L2Normalize, Operator
from turbo_tvm.ops.call import to_call
from turbo_tvm.passes.call_kernels import call_kernels


@dataclass(frozen=True)
class Kernel:
    """A stand-in for the compiler's kernels: one per eps, all of the same name."""

    eps: float
    name: str = "normalize_8"


def choose(operator: Operator) -> Kernel:
    assert isinstance(operator, L2Normalize)
    return Kernel(operator.eps)


def build(*eps: float, functions: tuple[str, ...] = ("encode",)) -> tvm.IRModule:
    """Functions that normalise their rows with each eps in turn, and add what they were given."""
    builder = relax.BlockBuilder()
    for name in functions:
        rows = relax.TensorType((tirx.Var("n", "int64"), 4, 8), "float32")
        x = relax.Var("x", rows)
        with builder.function(name, [x], attrs={"num_input": 1}):
            with builder.dataflow():
                y = x
                for value in eps:
                    y = builder.emit(to_call(L2Normalize(x=y, eps=value, out=rows)))
                out = builder.emit_output(relax.op.add(y, x))
            builder.emit_func_output(out)
    return builder.finalize()


def calls(mod: tvm.IRModule, name: str = "encode") -> list[relax.Call]:
    values = [b.value for block in mod[name].body.blocks for b in block.bindings]
    return [v for v in values if isinstance(v, relax.Call) and v.op.name == "relax.call_dps_packed"]


def callees(mod: tvm.IRModule, name: str = "encode") -> list[str]:
    return [str(call.args[0].global_symbol) for call in calls(mod, name)]


def test_every_operator_becomes_a_call_and_others_stay():
    mod, kernels = call_kernels(build(1e-6), choose)
    assert callees(mod) == ["normalize_8"]
    assert kernels == {"normalize_8": Kernel(1e-6)}
    text = mod["encode"].script()
    assert "R.add(" in text and "turbo." not in text
    assert int(mod["encode"].attrs["num_input"]) == 1
    relax.analysis.well_formed(mod)  # raises for what is not


def test_a_call_takes_the_tensors_and_gives_the_type():
    (call,) = calls(call_kernels(build(1e-6), choose)[0])
    assert [tensor.name for tensor in call.args[1].fields] == ["x"]
    assert [getattr(d, "value", d) for d in call.ty_args[0].shape.values][1:] == [4, 8]


def test_equal_kernels_are_shared_within_and_between_functions():
    mod, kernels = call_kernels(build(1e-6, 1e-6, functions=("encode", "transform_weights")), choose)
    assert list(kernels) == ["normalize_8"]
    assert callees(mod) == callees(mod, "transform_weights") == ["normalize_8", "normalize_8"]


def test_different_kernels_of_one_name_stay_apart():
    mod, kernels = call_kernels(build(1e-6, 1e-5, 1e-6), choose)
    assert callees(mod) == ["normalize_8", "normalize_8_1", "normalize_8"]
    assert kernels == {"normalize_8": Kernel(1e-6), "normalize_8_1": Kernel(1e-5)}


def test_a_kernel_does_not_take_the_name_of_a_function():
    mod, kernels = call_kernels(build(1e-6, functions=("encode", "normalize_8")), choose)
    assert list(kernels) == ["normalize_8_1"]
    assert callees(mod) == ["normalize_8_1"]


def test_functions_that_are_kernels_already_and_attributes_are_kept():
    mod = build(1e-6).with_attr("of", "a model")
    other = tirx.PrimFunc([], tirx.Evaluate(0)).with_attr("global_symbol", "other")
    mod["other"] = other
    lowered, _ = call_kernels(mod, choose)
    assert lowered["other"].same_as(other)
    assert lowered.attrs["of"] == "a model"


def test_an_operator_without_a_kernel_is_an_error():
    def none(operator: Operator) -> Kernel:
        raise KeyError(operator.NAME)

    with pytest.raises(KeyError, match="normalize"):
        call_kernels(build(1e-6), none)
