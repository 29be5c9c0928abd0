"""Products with weights, their biases and activations: what is fused, and what must be left alone."""

from __future__ import annotations

from typing import TypeVar

import pytest
import tvm
from operators import module_of, operators_of, others_of
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from turbo_tvm.ops import Linear
from turbo_tvm.passes.fuse_linear import fuse_linear

b = TypeVar("b")
s = TypeVar("s")

GELU = '{"activation": "gelu", "tensors": ["x", "weight", "bias"]}'


def fused(mod: tvm.IRModule) -> tvm.IRModule:
    return fuse_linear(mod, "main")


def linears(mod: tvm.IRModule) -> list[Linear]:
    return operators_of(mod, Linear)


def build(body, *shapes) -> tvm.IRModule:
    """`main(x (b, s, 8), *weights)` that returns `body(emit, x, *weights)`."""
    batch, length = tvm.tirx.Var("b", "int64"), tvm.tirx.Var("s", "int64")
    x = relax.Var("x", relax.TensorType((batch, length, 8), "float32"))
    weights = [relax.Var(f"w{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    return module_of([x, *weights], body)


def test_product_bias_and_activation_become_one():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((b, s, 8), "float32"), w: R.Tensor((4, 8), "float32"), c: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                transposed = R.permute_dims(w)
                product = R.matmul(x, transposed)
                shifted = R.add(product, c)
                out = R.nn.gelu(shifted)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((b, s, 8), "float32"), w: R.Tensor((4, 8), "float32"), c: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.call_dps_packed("turbo.linear", (x, w, c, R.str(GELU)), out_ty=R.Tensor((b, s, 4), "float32"))
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(fused(Before), Expected)


def test_product_without_bias_gets_a_zero_one():
    mod = build(lambda emit, x, w: relax.op.matmul(x, emit(relax.op.permute_dims(w))), (4, 8))
    (linear,) = linears(fused(mod))
    assert linear.bias.value.numpy().tolist() == [0, 0, 0, 0]


def test_bias_may_stand_on_either_side():
    mod = build(
        lambda emit, x, w, c: relax.op.add(c, emit(relax.op.matmul(x, emit(relax.op.permute_dims(w))))), (4, 8), (4,)
    )
    (linear,) = linears(fused(mod))
    assert linear.bias.name == "w1"
    assert others_of(fused(mod)) == []


def test_weight_stored_as_in_by_out_is_transposed():
    mod = fused(build(lambda emit, x, w: relax.op.matmul(x, w), (8, 4)))
    (linear,) = linears(mod)
    assert others_of(mod) == ["relax.permute_dims"]
    assert [int(d) for d in linear.weight.ty.shape.values] == [4, 8]


def test_permute_that_transposes_nothing_is_not_taken_for_a_transpose():
    mod = fused(build(lambda emit, x, w: relax.op.matmul(x, emit(relax.op.permute_dims(w, [0, 1]))), (8, 8)))
    assert others_of(mod) == ["relax.permute_dims", "relax.permute_dims"]


@pytest.mark.parametrize("activation", ["nn.gelu", "nn.gelu_tanh", "nn.relu", "tanh"])
def test_every_activation_of_the_kernel_is_fused(activation):
    module, name = (relax.op.nn, activation[3:]) if activation.startswith("nn.") else (relax.op, activation)
    mod = build(lambda emit, x, w: getattr(module, name)(emit(relax.op.matmul(x, w))), (8, 4))
    (linear,) = linears(fused(mod))
    assert linear.activation == name


def test_other_activations_keep_their_operator():
    mod = fused(build(lambda emit, x, w: relax.op.sigmoid(emit(relax.op.matmul(x, w))), (8, 4)))
    assert [f.activation for f in linears(mod)] == [None]
    assert "relax.sigmoid" in others_of(mod)


def test_activation_of_an_activation_keeps_its_operator():
    mod = build(lambda emit, x, w: relax.op.tanh(emit(relax.op.nn.relu(emit(relax.op.matmul(x, w))))), (8, 4))
    assert [f.activation for f in linears(fused(mod))] == ["relu"]
    assert "relax.tanh" in others_of(fused(mod))


def test_activation_whose_product_has_other_readers_keeps_its_operator():
    def body(emit, x, w):
        product = emit(relax.op.matmul(x, w))
        return relax.op.multiply(emit(relax.op.nn.relu(product)), product)

    mod = fused(build(body, (8, 4)))
    assert [f.activation for f in linears(mod)] == [None]
    assert "relax.nn.relu" in others_of(mod)


def test_bias_whose_product_has_other_readers_keeps_its_operator():
    def body(emit, x, w, c):
        product = emit(relax.op.matmul(x, w))
        return relax.op.multiply(emit(relax.op.add(product, c)), product)

    assert "relax.add" in others_of(fused(build(body, (8, 4), (4,))))


def test_second_bias_keeps_its_operator():
    def body(emit, x, w, c, d):
        return relax.op.add(emit(relax.op.add(emit(relax.op.matmul(x, w)), c)), d)

    mod = fused(build(body, (8, 4), (4,), (4,)))
    assert [f.bias.name for f in linears(mod)] == ["w1"]
    assert "relax.add" in others_of(mod)


def test_constant_bias_is_not_replaced_by_a_second_bias():
    constant = relax.const([1.0, 2.0, 3.0, 4.0], "float32")

    def body(emit, x, w, c):
        return relax.op.add(emit(relax.op.add(emit(relax.op.matmul(x, w)), constant)), c)

    mod = fused(build(body, (8, 4), (4,)))
    (linear,) = linears(mod)
    assert linear.bias.value.numpy().tolist() == [1, 2, 3, 4]
    assert "relax.add" in others_of(mod)


def test_bias_that_is_not_a_vector_of_weights_keeps_its_operator():
    mod = fused(build(lambda emit, x, w, c: relax.op.add(emit(relax.op.matmul(x, w)), c), (8, 4), (1, 4)))
    assert "relax.add" in others_of(mod)


@pytest.mark.parametrize("other", ["transpose of x", "sum of x", "zeros of its length"])
def test_product_of_two_activations_is_left_alone(other):
    def body(emit, x):
        if other == "transpose of x":
            return relax.op.matmul(x, emit(relax.op.permute_dims(x, [0, 2, 1])))
        if other == "sum of x":  # of constant shape, and yet no weight
            total = emit(relax.op.sum(x, [0, 1]))
            return relax.op.matmul(x, emit(relax.op.broadcast_to(total, (8, 8))))
        length = x.ty.shape.values[1]
        return relax.op.matmul(emit(relax.op.permute_dims(x, [0, 2, 1])), emit(relax.op.zeros((length, 4), "float32")))

    before = build(body)
    after = fused(before)
    assert linears(after) == []
    tvm.ir.assert_structural_equal(after, before)


def test_product_with_a_weight_per_batch_is_left_alone():
    before = build(lambda emit, x, w: relax.op.matmul(x, w), (1, 8, 4))
    tvm.ir.assert_structural_equal(fused(before), before)


def test_product_of_weights_is_left_alone():
    def body(emit, x, v, w):
        return relax.op.add(x, emit(relax.op.matmul(v, w)))

    before = build(body, (8, 8), (8, 8))
    assert len(linears(fused(before))) == 0


def test_deep_models_do_not_exhaust_the_stack():
    def body(emit, x, w):
        for _ in range(1500):
            x = emit(relax.op.negative(x))
        return relax.op.matmul(x, w)

    assert len(linears(fused(build(body, (8, 4))))) == 1


def gated(factor: float = 1.702, swapped: bool = False, other: bool = False, again: bool = False):
    def body(emit, x, w):
        y = emit(relax.op.matmul(x, emit(relax.op.permute_dims(w))))
        scaled = emit(relax.op.multiply(emit(relax.op.negative(y)) if other else y, relax.const(factor, "float32")))
        gate = emit(relax.op.sigmoid(scaled))
        out = emit(relax.op.multiply(gate, y) if swapped else relax.op.multiply(y, gate))
        return emit(relax.op.add(out, y)) if again else out

    return body


@pytest.mark.parametrize("swapped", [False, True])
def test_quick_gelu(swapped):
    mod = fused(build(gated(swapped=swapped), (4, 8)))
    assert [f.activation for f in linears(mod)] == ["quick_gelu"] and others_of(mod) == []


@pytest.mark.parametrize("options", [{"factor": 1.7}, {"other": True}, {"again": True}])
def test_what_only_looks_like_quick_gelu_keeps_its_others_of(options):
    mod = fused(build(gated(**options), (4, 8)))
    assert [f.activation for f in linears(mod)] == [None] and "relax.sigmoid" in others_of(mod)


def test_factors_of_columns_go_into_the_weights():
    def body(emit, x, w, bias, factors):
        product = emit(relax.op.matmul(x, emit(relax.op.permute_dims(w))))
        return emit(relax.op.multiply(factors, emit(relax.op.add(product, bias))))

    mod = fused(build(body, (4, 8), (4,), (4,)))
    (linear,) = linears(mod)
    bound = {b.var: b.value for block in mod["main"].body.blocks for b in block.bindings}
    weight, bias = (bound[t] for t in (linear.weight, linear.bias))
    assert (weight.op.name, weight.args[0].name, bias.args[0].name) == ("relax.multiply", "w0", "w1")


@pytest.mark.parametrize("shape", [(1, 1, 4), (1,)])
def test_other_factors_are_left_alone(shape):
    def body(emit, x, w, factors):
        return emit(relax.op.multiply(emit(relax.op.matmul(x, emit(relax.op.permute_dims(w)))), factors))

    assert others_of(fused(build(body, (4, 8), shape)))[-1] == "relax.multiply"
