"""The twin of a function that replays a graph."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from turbo_tvm.passes.capture_graphs import capture_graphs, captured


@I.ir_module
class Before:
    @T.prim_func(private=True, s_tir=True)
    def double(x: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, 4), "float32")
        Out = T.match_buffer(out, (n, 4), "float32")
        for i, j in T.grid(n, 4):
            with T.sblock("b"):
                vi, vj = T.axis.remap("SS", [i, j])
                Out[vi, vj] = X[vi, vj] * T.float32(2)

    @R.function(pure=False)
    def main(
        x: R.Tensor(("n", 4), "float32"),
        buffer_0: R.Tensor(("n", 4), "float32"),
        buffer_1: R.Tensor(("n", 4), "float32"),
    ) -> R.Tensor(("n", 4), "float32"):
        R.func_attr({"num_input": 1})
        cls = Before
        _ = cls.double(x, buffer_0)
        _1 = cls.double(buffer_0, buffer_1)
        gv = buffer_1
        return gv


def calls(func: relax.Function) -> list[str]:
    values = [b.value for block in func.body.blocks for b in block.bindings]
    return [v.op.name_hint for v in values if isinstance(v, relax.Call) and isinstance(v.op, tvm.ir.GlobalVar)]


def test_every_kernel_is_captured_and_main_is_as_it_was():
    after = capture_graphs(Before, "main")
    tvm.ir.assert_structural_equal(after["main"], Before["main"])
    lifted = [
        var for var in after.get_global_vars() if "capture" in var.name_hint and var.name_hint != captured("main")
    ]
    assert len(lifted) == 1
    assert calls(after[lifted[0]]) == ["double", "double"]
    text = after[captured("main")].script(show_meta=False)
    assert text.count("run_or_capture") == 1 and "double" not in text
    relax.analysis.well_formed(after)


def test_other_functions_stay():
    assert {v.name_hint for v in Before.get_global_vars()} < {
        v.name_hint for v in capture_graphs(Before, "main").get_global_vars()
    }
