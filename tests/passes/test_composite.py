"""Composites are ordinary Relax calls: built, recognised, printed, parsed and compared like any other."""

from __future__ import annotations

from typing import TypeVar

import tvm
import tvm_ffi
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.passes import composite

b = TypeVar("b")

TYPE = relax.TensorType((4, 8), "float32")


def rows(name: str) -> relax.Var:
    return relax.Var(name, TYPE)


def test_match_gives_back_what_was_made():
    x, r = rows("x"), rows("r")
    attrs = {"eps": 1e-12, "residual": True, "mode": None, "columns": [[8, 0]]}
    found = composite.match(composite.make("norm", [x, r], TYPE, **attrs))
    assert found is not None
    assert (found.name, found.tensors, found.attrs) == ("norm", (x, r), attrs)


def test_match_by_name():
    call = composite.make("norm", [rows("x")], TYPE)
    assert composite.match(call, "norm") is not None
    assert composite.match(call, "linear") is None
    assert composite.match(call, "turbo.norm") is None


def test_anything_else_is_no_composite():
    x = rows("x")
    foreign = relax.op.call_dps_packed("other.norm", [x], out_ty=TYPE)
    for expr in (None, x, relax.op.nn.relu(x), relax.Tuple([x]), foreign):
        assert composite.match(expr) is None


def test_attributes_are_spelt_in_one_order():
    x = rows("x")
    left = composite.make("norm", [x], TYPE, eps=1e-5, residual=False)
    right = composite.make("norm", [x], TYPE, residual=False, eps=1e-5)
    tvm.ir.assert_structural_equal(left, right)


def test_other_attributes_are_another_composite():
    x = rows("x")
    left, right = (composite.make("norm", [x], TYPE, eps=eps) for eps in (1e-5, 1e-6))
    assert not tvm_ffi.structural_equal(left, right)


def test_printed_composites_are_parsed_again():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((b, 8), "float32")):
            with R.dataflow():
                out = R.call_dps_packed(
                    "turbo.normalize", (x, R.str('{"eps": 1e-12}')), out_ty=R.Tensor((b, 8), "float32")
                )
                R.output(out)
            return out

    again = tvm.script.from_source(Module.script())
    tvm.ir.assert_structural_equal(again, Module)
    found = composite.match(again["main"].body.blocks[0].bindings[0].value)
    assert found is not None and found.attrs == {"eps": 1e-12}
