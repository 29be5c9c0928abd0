"""Values that are known when a graph is read: against ONNX's reference with the dimensions put in."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from tvm import tirx
from tvm.sym.analyzer import Analyzer

from turbo_tvm.frontends.onnx.values import Values

B, S = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
NUMBERS = {B: 3, S: 11}


def shape(*dims) -> np.ndarray:
    values = np.empty(len(dims), object)
    values[:] = dims
    return values


def concrete(value: np.ndarray) -> np.ndarray:
    """With the dimensions' numbers in the place of symbols."""
    if value.dtype != object:
        return value
    analyzer = Analyzer()
    for dim, number in NUMBERS.items():
        analyzer.bind(dim, tirx.const(number, "int64"))
    numbers = [v if isinstance(v, int) else int(analyzer.simplify(v).value) for v in value.reshape(-1)]
    return np.array(numbers, np.int64).reshape(value.shape)


def evaluate(op: str, *inputs: np.ndarray | None, **attrs):
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    node = helper.make_node(op, names, ["out"], **attrs)
    parsed = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return Values((B, S), 17).evaluate(node, inputs, parsed)


def reference(op: str, *inputs: np.ndarray | None, **attrs) -> np.ndarray:
    """What the node gives for the dimensions' numbers."""
    (found,) = evaluate(op, *(None if x is None else concrete(x) for x in inputs), **attrs)
    return found


CASES = [
    ("Gather", [shape(B, S, 32), np.array(1)], {"axis": 0}),
    ("Gather", [shape(B, S, 32), np.array([0, -1])], {}),
    ("Slice", [shape(B, S, 32, 4), np.array([1]), np.array([3])], {}),
    ("Slice", [shape(B, S, 32, 4), np.array([-1]), np.array([-4]), np.array([0]), np.array([-1])], {}),
    ("Concat", [shape(B), shape(S, 12), np.array([64])], {"axis": 0}),
    ("Unsqueeze", [shape(B, S), np.array([0])], {}),
    ("Squeeze", [shape(B).reshape(1, 1), np.array([0])], {}),
    ("Squeeze", [shape(S)], {}),
    ("Reshape", [shape(B, S), np.array([2, 1])], {}),
    ("Expand", [shape(B), np.array([3])], {}),
    ("Where", [np.array([True, False]), shape(B, 7), shape(S, S)], {}),
    ("ReduceProd", [shape(B, S, 4)], {"keepdims": 0}),
    ("Add", [shape(B, S), np.array(5)], {}),
    ("Sub", [shape(S), shape(B)], {}),
    ("Mul", [shape(B, S), shape(S, 2)], {}),
    ("Div", [shape(S, S * 6), np.array([2, 3])], {}),
    ("Mod", [shape(S), np.array([4])], {}),
    ("Max", [shape(B, S), np.array([1, 64])], {}),
    ("Min", [shape(B, S), np.array([1, 64])], {}),
    ("Identity", [shape(B, S)], {}),
    ("Cast", [shape(B, S)], {"to": onnx.TensorProto.INT64}),
    ("Equal", [shape(B, S, 5), np.array([-1, 0, 5])], {}),
    ("Less", [shape(B, 4), np.array([1, 5])], {}),
    ("GreaterOrEqual", [shape(B, S), np.array([1, 0])], {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "attrs"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_symbolic_values_are_those_of_the_reference(op, inputs, attrs):
    (found,) = evaluate(op, *inputs, **attrs)
    wanted = reference(op, *inputs, **attrs)
    np.testing.assert_array_equal(concrete(found), wanted)
    assert found.shape == wanted.shape


@pytest.mark.parametrize(
    ("op", "inputs", "attrs"),
    [
        ("Equal", [shape(B), shape(S)], {}),  # depends on the request
        ("Less", [shape(S), np.array([64])], {}),
        ("Cast", [shape(S)], {"to": onnx.TensorProto.FLOAT}),
        ("Gather", [np.arange(9), shape(S)], {}),
        ("Sqrt", [shape(S)], {}),
    ],
    ids=["Equal", "Less", "Cast", "Gather", "Sqrt"],
)
def test_none_where_it_cannot_be_known(op, inputs, attrs):
    assert evaluate(op, *inputs, **attrs) is None


def test_numbers_are_left_to_the_reference():
    (found,) = evaluate("Sqrt", np.array([4.0, 9.0], np.float32))
    np.testing.assert_array_equal(found, [2, 3])
    assert evaluate("RandomNormal", shape=[2]) is None


DIMENSIONS = st.lists(st.sampled_from([B, S, 2, 3, 32]), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(whole=DIMENSIONS, kept=st.data())
def test_a_quotient_of_products_is_exact(whole, kept):
    part = kept.draw(st.lists(st.sampled_from(range(len(whole))), unique=True, max_size=len(whole)))
    rest = [d for i, d in enumerate(whole) if i not in part]
    found = Values((B, S), 17).quotient(whole, [whole[i] for i in part])
    (value,) = concrete(shape(found))
    assert value == np.prod([NUMBERS.get(d, d) if not isinstance(d, int) else d for d in rest])
