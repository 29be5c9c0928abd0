"""Operators become calls of kernels, and equal kernels become one."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from turbo_tvm.ops import L2Normalize, Operator
from turbo_tvm.ops.call import to_call
from turbo_tvm.passes.lower_kernels import lower_kernels


def kernel(factor: float) -> tirx.PrimFunc:
    @T.prim_func(s_tir=True, private=True)
    def scale(x: T.handle, y: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        source = T.match_buffer(x, (n, 8), "float32")
        out = T.match_buffer(y, (n, 8), "float32")
        for i, j in T.grid(n, 8):
            with T.sblock("scale"):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = source[vi, vj] * T.float32(factor)

    return scale


class Kernels:
    """A stand-in for the compiler's kernels: each multiplies with its operator's eps, and all have the same name."""

    def __init__(self):
        self.made: dict[float, tirx.PrimFunc] = {}
        self.asked: list[tuple[str, tuple[str, ...], int]] = []

    def __call__(self, operator: Operator) -> tuple[str, tirx.PrimFunc]:
        self.asked.append((operator.NAME, tuple(t.name for t in operator.tensors), int(operator.out.shape.values[-1])))
        assert isinstance(operator, L2Normalize)
        self.made.setdefault(operator.eps, kernel(operator.eps))
        return "scale", self.made[operator.eps]


def build(*factors: float, functions: tuple[str, ...] = ("main",)) -> tvm.IRModule:
    """Functions that scale their rows by each factor in turn, and add what they were given.

    To the pass operators are opaque: a normalisation stands for any, and its eps is what tells kernels apart.
    """
    bb = relax.BlockBuilder()
    for name in functions:
        rows = relax.TensorType((tirx.Var("n", "int64"), 8), "float32")
        x = relax.Var("x", rows)
        with bb.function(name, [x], attrs={"num_input": 1}):
            with bb.dataflow():
                y = x
                for factor in factors:
                    y = bb.emit(to_call(L2Normalize(x=y, eps=factor, out=rows)))
                out = bb.emit_output(relax.op.add(y, x))
            bb.emit_func_output(out)
    return bb.finalize()


def prim_funcs(mod: tvm.IRModule) -> list[str]:
    return sorted(v.name_hint for v, f in mod.functions_items() if isinstance(f, tirx.PrimFunc))


def callees(mod: tvm.IRModule, name: str = "main") -> list[str]:
    values = [b.value for block in mod[name].body.blocks for b in block.bindings]
    calls = [v for v in values if isinstance(v, relax.Call) and v.op.name == "relax.call_tir"]
    return [call.args[0].name_hint for call in calls]


def test_every_operator_becomes_a_call_and_those_of_tvm_stay():
    kernels = Kernels()
    mod = lower_kernels(build(2.0), kernels)
    assert callees(mod) == ["scale"]
    assert "R.add(" in mod["main"].script() and "turbo." not in mod["main"].script()
    assert kernels.asked == [("normalize", ("x",), 8)]
    assert int(mod["main"].attrs["num_input"]) == 1


def test_equal_kernels_are_shared_within_and_between_functions():
    mod = lower_kernels(build(2.0, 2.0, functions=("main", "transform_weights")), Kernels())
    assert prim_funcs(mod) == ["scale"]
    assert callees(mod) == callees(mod, "transform_weights") == ["scale", "scale"]


def test_different_kernels_of_one_name_stay_apart():
    mod = lower_kernels(build(2.0, 3.0), Kernels())
    assert len(prim_funcs(mod)) == 2
    assert len(set(callees(mod))) == 2


def test_functions_that_are_kernels_already_are_kept():
    mod = build(2.0)
    mod["other"] = kernel(5.0).with_attr("global_symbol", "other")
    assert prim_funcs(lower_kernels(mod, Kernels())) == ["other", "scale"]


def test_the_lowered_module_computes_what_the_kernels_do():
    mod = lower_kernels(build(2.0, 3.0), Kernels())
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    x = np.arange(24, dtype="float32").reshape(3, 8)
    np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x)).numpy(), 7 * x)


def test_an_operator_without_a_kernel_is_an_error():
    def none(operator):
        raise KeyError(operator.NAME)

    with pytest.raises(KeyError, match="normalize"):
        lower_kernels(build(2.0), none)
