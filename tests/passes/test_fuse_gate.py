"""Gated feed-forwards: two products become one in front of a gate, two halves a gate alone."""

from __future__ import annotations

import pytest
from operators import operators_of, values_of
from tvm import relax, tirx

from turbo_tvm.ops import Gate, Linear
from turbo_tvm.ops.call import to_call
from turbo_tvm.passes.fuse_gate import fuse_gate
from turbo_tvm.passes.rewriter import is_call


def products(*, activation="silu", second_rows="x", swapped=False, read_first=False, second_activation=None):
    """act(linear(x, w0)) * linear(x, w1)."""
    rows = relax.TensorType((tirx.Var("t", "int64"), 4, 8), "float32")
    out = relax.TensorType((*rows.shape.values[:2], 12), "float32")
    x, other = relax.Var("x", rows), relax.Var("other", rows)
    weights = [relax.Var(name, relax.TensorType((12, 8), "float32")) for name in ("w0", "w1")]
    biases = [relax.Var(name, relax.TensorType((12,), "float32")) for name in ("b0", "b1")]
    bb = relax.BlockBuilder()
    with bb.function("main", [x, other, *weights, *biases], attrs={"num_input": 2}):
        with bb.dataflow():
            sources, activations = (x, x if second_rows == "x" else other), (activation, second_activation)
            a, b = (
                bb.emit(to_call(Linear(x=source, weight=weight, bias=bias, activation=name, out=out)))
                for source, weight, bias, name in zip(sources, weights, biases, activations, strict=True)
            )
            total = bb.emit(relax.op.multiply(*((b, a) if swapped else (a, b))))
            result = bb.emit_output(bb.emit(relax.op.add(total, a)) if read_first else total)
        bb.emit_func_output(result)
    return bb.finalize()


def halves(*, order=(0, 1), sliced=False, parts=2):
    """act(half of y) * half of y."""
    y = relax.Var("y", relax.TensorType((tirx.Var("t", "int64"), 4, 12 * parts), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [y], attrs={"num_input": 1}):
        with bb.dataflow():
            if sliced:
                both = [bb.emit(relax.op.strided_slice(y, [2], [12 * i], [12 * i + 12])) for i in order]
            else:
                split = bb.emit(relax.op.split(y, parts, axis=-1))
                both = [bb.emit(relax.TupleGetItem(split, i)) for i in order]
            active = bb.emit(relax.op.nn.gelu(both[0]))
            result = bb.emit_output(bb.emit(relax.op.multiply(active, both[1])))
        bb.emit_func_output(result)
    return bb.finalize()


def fused(mod, kind):
    return operators_of(fuse_gate(mod, "main"), kind)


@pytest.mark.parametrize("swapped", [False, True])
def test_two_products_become_one(swapped):
    mod = products(swapped=swapped)
    (gate,), (linear,) = fused(mod, Gate), fused(mod, Linear)
    assert gate.attributes() == {"activation": "silu", "columns": 12}
    assert linear.is_plain and linear.attributes() == {}
    assert [a.name for a in linear.arguments()] == ["x", "weight", "bias"]
    assert [int(d) for d in linear.weight.ty.shape.values] == [24, 8]
    names = [
        [field.name for field in value.args[0].fields]
        for value in values_of(fuse_gate(mod, "main"))
        if is_call(value, "concat")
    ]
    assert names == [["w0", "w1"], ["b0", "b1"]]


@pytest.mark.parametrize(
    "change", [{"second_rows": "other"}, {"read_first": True}, {"activation": None}, {"second_activation": "relu"}]
)
def test_other_products_are_left_alone(change):
    assert fused(products(**change), Gate) == []


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_halves(order, sliced):
    (gate,) = fused(halves(order=order, sliced=sliced), Gate)
    assert gate.x.name == "y"
    assert gate.attributes() == {"activation": "gelu", "columns": 12} | ({"second": True} if order[0] else {})


@pytest.mark.parametrize("change", [{"order": (0, 0)}, {"parts": 3}, {"parts": 3, "sliced": True}])
def test_other_parts_are_left_alone(change):
    assert fused(halves(**change), Gate) == []
