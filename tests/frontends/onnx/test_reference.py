"""What a file answers itself, and the batches that it is asked."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from turbo_tvm.artifact.manifest import PositionRule, RequestLimits
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.onnx.inputs import read_inputs
from turbo_tvm.frontends.onnx.reference import Reference, image_sample, text_sample

TABLE = np.arange(50, dtype=np.float32).reshape(25, 2)


def texts(batch="batch", length="length", operator: str = "Gather") -> onnx.ModelProto:
    """A look-up of token ids in TABLE."""
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, (batch, length)) for n in ("input_ids", "attention_mask")
    ]
    out = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, (batch, length, 2))
    node = helper.make_node(operator, ["table", "input_ids"], ["hidden"])
    graph = helper.make_graph([node], "graph", inputs, [out], [numpy_helper.from_array(TABLE, "table")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def reference(tmp_path):
    """`reference(model)`: the file and its reference."""

    def get(model: onnx.ModelProto) -> Reference:
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return Reference(path, model)

    return get


def test_both_answer_the_same(reference, monkeypatch):
    inputs = {"input_ids": np.array([[5, 1]]), "attention_mask": np.array([[1, 1]])}
    by_runtime = reference(texts())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    by_reference = reference(texts())
    assert by_runtime.name.startswith("ONNX Runtime ") and by_reference.name.startswith("ONNX's reference ")
    for each in (by_runtime, by_reference):
        np.testing.assert_array_equal(each(inputs)["hidden"], TABLE[[[5, 1]]])


def test_files_of_a_fixed_batch_are_asked_in_parts(reference):
    ids = np.arange(8).reshape(4, 2)
    got = reference(texts(2, 2))({"input_ids": ids, "attention_mask": np.ones_like(ids)}, batch=2)
    np.testing.assert_array_equal(got["hidden"], TABLE[ids])


def test_files_that_cannot_be_run(reference, monkeypatch):
    with pytest.raises(UnsupportedModelError, match="is refused by ONNX Runtime"):
        reference(texts(operator="NoSuchOperator"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedModelError, match=r"ONNX's reference cannot run it .*: install ONNX Runtime"):
        reference(texts(operator="NoSuchOperator"))


def test_a_batch_of_texts(reference, tmp_path):
    """Ragged, padded on the right, one sequence as long as asked, any ids, small ones among the first."""
    model = texts()
    inputs = read_inputs(tmp_path, model)
    limits = RequestLimits(9, 25, 2), PositionRule()
    sample = text_sample(reference(model), inputs, limits, np.random.default_rng(0), (6, 9))
    assert sample.token_ids.shape == sample.mask.shape == sample.token_type_ids.shape == (6, 9)
    lengths = sample.mask.sum(1)
    assert lengths[0] == 9 and lengths.min() >= 1 and len(set(lengths)) > 1
    assert all((np.diff(row) <= 0).all() for row in sample.mask)
    assert sample.token_ids[:, 1].tolist() == [0, 1, 2, 3, 4, 0] and sample.token_ids.max() < 25
    np.testing.assert_array_equal(sample.outputs["hidden"], TABLE[sample.token_ids])


def test_a_batch_of_texts_for_a_fixed_length(reference, tmp_path):
    model = texts(2, 4)
    limits = RequestLimits(9, 25, 0), PositionRule()
    sample = text_sample(reference(model), read_inputs(tmp_path, model), limits, np.random.default_rng(0), (4, 9))
    assert sample.token_ids.shape == (4, 4) and sample.token_type_ids is None


def test_a_batch_of_images(reference, tmp_path):
    image = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ("batch", 3, 2, 2))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ("batch", 3, 2, 2))
    graph = helper.make_graph([helper.make_node("Neg", ["pixels"], ["out"])], "graph", [image], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sample = image_sample(reference(model), read_inputs(tmp_path, model), np.random.default_rng(0), 5)
    assert sample.pixels.shape == (5, 3, 2, 2) and sample.pixels.dtype == np.float32
    np.testing.assert_array_equal(sample.outputs["out"], -sample.pixels)
