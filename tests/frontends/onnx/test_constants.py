"""What of an ONNX graph is a weight, and what a value that is known."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.onnx.constants import Constants


def constants(nodes=(), taken=(), **arrays: np.ndarray) -> Constants:
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    found = Constants(set(taken))
    found.add_all(helper.make_graph(list(nodes), "graph", [], [], tensors))
    return found


def test_tensors_of_floats_are_weights_and_all_else_is_known():
    found = constants(table=np.ones((3, 2), np.float32), shape=np.array([1, -1]), eps=np.array([0.5], np.float32))
    assert list(found.weights) == list(found.variables) == ["table"] and list(found.known) == ["shape", "eps"]
    var, value = found.weights["table"]
    assert (str(var.ty.dtype), value.shape) == ("float32", (3, 2)) and found.variables["table"].same_as(var)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_are_fp32(dtype):
    (value,) = [v for _, v in constants(w=np.full(4, 0.5, dtype)).weights.values()]
    assert value.dtype == np.float32 and (value == 0.5).all()


def test_names_become_identifiers_that_are_free():
    arrays = {name: np.ones(2, np.float32) for name in ("model.a.b", "a/b", "onnx::MatMul_7", "7", "input_ids")}
    found = constants(taken={"input_ids"}, **arrays)
    assert list(found.weights) == ["a_b", "a_b_", "MatMul_7", "w_7", "input_ids_"]


def test_constant_nodes_and_graphs_inside_of_nodes():
    inner = helper.make_graph(
        [],
        "branch",
        [],
        [helper.make_empty_tensor_value_info("w")],
        [numpy_helper.from_array(np.ones(2, np.float32), "w")],
    )
    nodes = [
        helper.make_node("Constant", [], ["tensor"], value=numpy_helper.from_array(np.array([1, 2]))),
        helper.make_node("Constant", [], ["number"], value_float=0.5),
        helper.make_node("Constant", [], ["numbers"], value_ints=[3, 4]),
        helper.make_node("If", ["number"], ["out"], then_branch=inner, else_branch=inner),
    ]
    found = constants(nodes)
    assert {name: value.tolist() for name, value in found.known.items()} == {
        "tensor": [1, 2],
        "number": 0.5,
        "numbers": [3, 4],
    }
    assert "w" in found.variables


def test_constants_of_other_kinds():
    with pytest.raises(UnsupportedModelError, match=r"Constant \(.*\) cannot be imported: its value is a value_string"):
        constants([helper.make_node("Constant", [], ["text"], value_string="a")])
