"""Operators that exporters take apart are found again, in any order of factors and terms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from tvm import ir, relax, tirx

from turbo_tvm.passes.compose_operators import compose_operators
from turbo_tvm.passes.rewriter import is_call

Emit = Callable[[relax.Expr], relax.Var]
op, nn = relax.op, relax.op.nn


def number(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def module(body: Callable[[Emit, relax.Var, relax.Var, relax.Var], relax.Expr]) -> ir.IRModule:
    """`main(x (b, s, 8), gamma (8,), beta (8,))` with that body."""
    b, s = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    x = relax.Var("x", relax.TensorType((b, s, 8), "float32"))
    gamma, beta = (relax.Var(name, relax.TensorType((8,), "float32")) for name in ("gamma", "beta"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, gamma, beta], attrs={"num_input": 1}):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, x, gamma, beta))
        builder.emit_func_output(out)
    return builder.finalize()


def calls(mod: ir.IRModule) -> list[relax.Call]:
    return [binding.value for block in mod["main"].body.blocks for binding in block.bindings]


def square(emit: Emit, x: relax.Expr, power: bool) -> relax.Expr:
    return emit(op.power(x, number(2.0)) if power else op.multiply(x, x))


@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_layer_norm(power, swapped):
    def body(emit, x, gamma, beta):
        centred = emit(op.subtract(x, emit(op.mean(x, [-1], keepdims=True))))
        variance = emit(op.mean(square(emit, centred, power), [2], keepdims=True))
        root = emit(op.sqrt(emit(op.add(variance, number(1e-6)))))
        normal = emit(op.divide(centred, root))
        scaled = emit(op.multiply(gamma, normal) if swapped else op.multiply(normal, gamma))
        return op.add(beta, scaled) if swapped else op.add(scaled, beta)

    (norm,) = calls(compose_operators(module(body), "main"))
    assert is_call(norm, "nn.layer_norm")
    assert [str(a.name) for a in norm.args] == ["x", "gamma", "beta"]
    assert norm.attrs.epsilon == pytest.approx(1e-6)


@pytest.mark.parametrize(("axis", "keepdims", "shift"), [(1, True, 0.0), (2, True, 1.0)])
def test_what_is_no_layer_norm_is_left_alone(axis, keepdims, shift):
    def body(emit, x, gamma, beta):
        mean = emit(op.add(emit(op.mean(x, [axis], keepdims=keepdims)), number(shift)))
        centred = emit(op.subtract(x, mean))
        variance = emit(op.mean(square(emit, centred, True), [2], keepdims=True))
        normal = emit(op.divide(centred, emit(op.sqrt(emit(op.add(variance, number(1e-6)))))))
        return op.add(emit(op.multiply(normal, gamma)), beta)

    before = module(body)
    ir.assert_structural_equal(compose_operators(before, "main"), before)


def erf_gate(emit: Emit, x: relax.Expr, by: float = math.sqrt(2.0)) -> relax.Expr:
    return emit(op.add(emit(op.erf(emit(op.divide(x, number(by))))), number(1.0)))


def tanh_gate(emit: Emit, x: relax.Expr, cubic: float = 0.044715) -> relax.Expr:
    cube = emit(op.multiply(emit(op.power(x, number(3.0))), number(cubic)))
    inner = emit(op.multiply(number(math.sqrt(2.0 / math.pi)), emit(op.add(x, cube))))
    return emit(op.add(number(1.0), emit(op.tanh(inner))))


@pytest.mark.parametrize(("gate", "name"), [(erf_gate, "nn.gelu"), (tanh_gate, "nn.gelu_tanh")])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_gelu(gate, name, order):
    def body(emit, x, gamma, beta):
        half, opened = number(0.5), gate(emit, x)
        if order == 0:
            return op.multiply(emit(op.multiply(x, half)), opened)
        if order == 1:
            return op.multiply(emit(op.multiply(x, opened)), half)
        return op.divide(emit(op.multiply(opened, x)), number(2.0))

    found = calls(compose_operators(module(body), "main"))
    assert len(found) == 1
    assert is_call(found[0], name)


@pytest.mark.parametrize("gate", [lambda e, x: erf_gate(e, x, 1.5), lambda e, x: tanh_gate(e, x, 0.05)])
def test_other_gates_are_left_alone(gate):
    before = module(lambda emit, x, gamma, beta: op.multiply(emit(op.multiply(x, number(0.5))), gate(emit, x)))
    ir.assert_structural_equal(compose_operators(before, "main"), before)


def test_a_gate_of_something_else_is_left_alone():
    def body(emit, x, gamma, beta):
        other = emit(op.add(x, gamma))
        return op.multiply(emit(op.multiply(x, number(0.5))), erf_gate(emit, other))

    before = module(body)
    ir.assert_structural_equal(compose_operators(before, "main"), before)


def test_the_number_is_that_of_numpy():
    """The constants above are those of GELU."""
    x = np.linspace(-4, 4, 9)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    erf = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    np.testing.assert_allclose(tanh, erf, atol=1e-3)
