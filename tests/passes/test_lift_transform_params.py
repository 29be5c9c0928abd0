"""`main` on inputs and prepared weights, and the function that prepares them: together they are the original."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops.entry import TRANSFORM_WEIGHTS
from turbo_tvm.passes.lift_transform_params import lift_transform_params

b = TypeVar("b")
s = TypeVar("s")


@I.ir_module
class Model:
    @R.function
    def main(
        x: R.Tensor((b, 8), "float32"),
        w: R.Tensor((4, 8), "float32"),
        v: R.Tensor((4, 8), "float32"),
        c: R.Tensor((8,), "float32"),
        unused: R.Tensor((3,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            both = R.concat((w, v), axis=0)
            stacked = R.permute_dims(both)
            y = R.matmul(x, stacked)
            shifted = R.add(y, c)
            doubled = R.multiply(w, R.const(2.0, "float32"))
            z = R.matmul(shifted, R.permute_dims(doubled))
            ones = R.ones((4,), "float32")
            more = R.add(z, ones)
            out = R.nn.relu(more)
            R.output(out)
        return out


def test_what_depends_on_weights_alone_moves_out():
    @I.ir_module
    class Expected:
        @R.function
        def transform_weights(
            w: R.Tensor((4, 8), "float32"),
            v: R.Tensor((4, 8), "float32"),
            c: R.Tensor((8,), "float32"),
            unused: R.Tensor((3,), "float32"),
        ):
            with R.dataflow():
                both = R.concat((w, v), axis=0)
                stacked = R.permute_dims(both)
                doubled = R.multiply(w, R.const(2.0, "float32"))
                turned = R.permute_dims(doubled)
                ones = R.ones((4,), "float32")
                out = (stacked, c, turned, ones)
                R.output(out)
            return out

        @R.function
        def main(
            x: R.Tensor((b, 8), "float32"),
            w: R.Tensor((8, 8), "float32"),
            c: R.Tensor((8,), "float32"),
            w_1: R.Tensor((8, 4), "float32"),
            constant: R.Tensor((4,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, w)
                shifted = R.add(y, c)
                z = R.matmul(shifted, w_1)
                more = R.add(z, constant)
                out = R.nn.relu(more)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(lift_transform_params(Model, "main"), Expected)


def test_prepared_weights_are_named_after_the_first_they_were_made_from():
    assert [p.name for p in lift_transform_params(Model, "main")["main"].params] == ["x", "w", "c", "w.1", "constant"]


def run(mod: tvm.IRModule, name: str, *arguments):
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    return machine[name](*[tvm.runtime.tensor(a) for a in arguments])


def test_main_of_prepared_weights_is_the_original():
    rng = np.random.default_rng(0)
    x, *weights = (rng.standard_normal(n).astype("float32") for n in ((5, 8), (4, 8), (4, 8), (8,), (3,)))
    lifted = lift_transform_params(Model, "main")
    prepared = run(lifted, TRANSFORM_WEIGHTS, *weights)
    got = run(lifted, "main", x, *(p.numpy() for p in prepared)).numpy()
    np.testing.assert_allclose(got, run(Model, "main", x, *weights).numpy(), rtol=1e-5)


def test_what_depends_on_the_length_stays():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s), "float32"), w: R.Tensor((1,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                zeros = R.zeros(R.shape([s]), "float32")
                shifted = R.add(zeros, w)
                out = R.add(x, shifted)
                R.output(out)
            return out

    lifted = lift_transform_params(Before, "main")
    tvm.ir.assert_structural_equal(lifted["main"], Before["main"])
    assert "zeros" not in lifted[TRANSFORM_WEIGHTS].script()


def test_number_that_depends_on_the_length_stays():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s), "float32"), w: R.Tensor((1,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                zeros = R.zeros(R.shape([s]), "float32")
                total = R.sum(zeros)
                scale = R.add(total, w)
                out = R.multiply(x, scale)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(lift_transform_params(Before, "main")["main"], Before["main"])


def test_without_anything_to_prepare_weights_pass_through():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, 8), "float32"), c: R.Tensor((8,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.add(x, c)
                R.output(out)
            return out

    lifted = lift_transform_params(Before, "main")
    tvm.ir.assert_structural_equal(lifted["main"], Before["main"])
    (prepared,) = run(lifted, TRANSFORM_WEIGHTS, np.arange(8, dtype="float32"))
    assert prepared.numpy().tolist() == list(range(8))
