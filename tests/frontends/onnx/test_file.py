"""Files that are damaged, foreign or contradict themselves: an error that says what is wrong, before any work."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import turbo_tvm
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.onnx.model import import_file
from turbo_tvm.frontends.options import ImportOptions

TOKENS = ["batch", "length"]


def model(nodes=None, *, opset=17, shapes=None, outputs=None, weights=None, domains=()) -> onnx.ModelProto:
    """An embedding, times the mask: the least that looks like an encoder."""
    shapes = shapes or {"input_ids": TOKENS, "attention_mask": TOKENS}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in shapes.items()]
    table = numpy_helper.from_array(np.ones((101, 8), np.float32), "table")
    nodes = nodes or [helper.make_node("Gather", ["table", "input_ids"], ["hidden"], "look_up")]
    out = outputs or [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*TOKENS, 8])]
    graph = helper.make_graph(nodes, "graph", inputs, out, [table] if weights is None else weights)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def saved(tmp_path: Path, made: onnx.ModelProto | bytes) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        import_file(path)
    assert str(path.name) in str(error.value) or "ONNX operator" in str(error.value)
    return str(error.value)


class TestDamaged:
    def test_no_file(self, tmp_path):
        with pytest.raises(UnsupportedModelError, match="there is no model"):
            turbo_tvm.compile(tmp_path / "model.onnx")

    def test_a_directory(self, tmp_path):
        (tmp_path / "model.onnx").mkdir()
        with pytest.raises(UnsupportedModelError, match="cannot be read"):
            import_file(tmp_path / "model.onnx")

    def test_empty(self, tmp_path):
        assert "holds no graph" in refusal(saved(tmp_path, b""))

    def test_something_else(self, tmp_path):
        assert "not an ONNX file" in refusal(saved(tmp_path, b"#!/bin/sh\nexit 1\n" * 50))

    @pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
    def test_cut_short(self, tmp_path, part):
        whole = model().SerializeToString()
        refusal(saved(tmp_path, whole[: int(len(whole) * part)]))

    def test_flipped_bytes_never_crash(self, tmp_path):
        whole = model().SerializeToString()
        rng = np.random.default_rng(0)
        for _ in range(100):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                broken[place] ^= int(rng.integers(1, 256))
            with suppress(UnsupportedModelError):
                import_file(saved(tmp_path, bytes(broken)))

    def test_a_cycle(self, tmp_path):
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Add", ["rows", "hidden"], ["other"]),
            helper.make_node("Identity", ["other"], ["hidden"]),
        ]
        assert "cycle" in refusal(saved(tmp_path, model(nodes)))

    def test_a_weight_of_another_size_than_declared(self, tmp_path):
        weight = numpy_helper.from_array(np.ones((101, 8), np.float32), "table")
        weight.dims[0] = 202
        assert "not a valid ONNX model" in refusal(saved(tmp_path, model(weights=[weight])))

    def test_an_output_of_another_shape_than_declared(self, tmp_path):
        out = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*TOKENS, 9])]
        assert "not a valid ONNX model" in refusal(saved(tmp_path, model(outputs=out)))

    def test_inputs_that_contradict_each_other(self, tmp_path):
        shapes = {"input_ids": [1, 8], "attention_mask": [1, 9]}
        assert "different dimensions" in refusal(saved(tmp_path, model(shapes=shapes)))


class TestExternalData:
    @pytest.fixture
    def path(self, tmp_path):
        onnx.save(
            model(), tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
        )
        return tmp_path / "model.onnx"

    def test_is_read(self, path):
        assert import_file(path).request_limits.vocab_size == 101

    def test_missing(self, path):
        path.with_name("weights.bin").unlink()
        assert "weights.bin, which is not beside it" in refusal(path)

    @pytest.mark.parametrize("size", [0, 100, 101 * 8 * 4 - 1])
    def test_too_short(self, path, size):
        data = path.with_name("weights.bin")
        data.write_bytes(data.read_bytes()[:size])
        assert "do not belong together" in refusal(path)

    def test_outside_of_the_folder(self, path):
        made = onnx.load(path, load_external_data=False)
        made.graph.initializer[0].external_data[0].value = "../weights.bin"
        path.write_bytes(made.SerializeToString())
        assert "outside" in refusal(path)


class TestUnsupported:
    @pytest.mark.parametrize("opset", [9, 24])
    def test_opsets(self, tmp_path, opset):
        assert f"opset {opset}" in refusal(saved(tmp_path, model(opset=opset)))

    def test_no_mask(self, tmp_path):
        assert "attention_mask is missing" in refusal(saved(tmp_path, model(shapes={"input_ids": TOKENS})))

    def test_other_inputs(self, tmp_path):
        shapes = {"input_ids": TOKENS, "attention_mask": TOKENS, "labels": TOKENS}
        assert "labels is not known" in refusal(saved(tmp_path, model(shapes=shapes)))

    def test_inputs_of_another_rank(self, tmp_path):
        shapes = {"input_ids": TOKENS, "attention_mask": [*TOKENS, "length"]}
        assert "3 dimensions" in refusal(saved(tmp_path, model(shapes=shapes)))

    def test_no_embedding(self, tmp_path):
        nodes = [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "two"], ["hidden"]),
        ]
        out = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*TOKENS, 1])]
        two = numpy_helper.from_array(np.array([2]), "two")
        assert "no table of embeddings" in refusal(saved(tmp_path, model(nodes, outputs=out, weights=[two])))

    @pytest.mark.parametrize(("domain", "operator"), [("com.acme", "Fancy"), ("com.microsoft", "MoE"), ("", "Det")])
    def test_an_operator_is_named_with_its_node_and_what_to_do(self, tmp_path, domain, operator):
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node(operator, ["rows"], ["hidden"], "the_node", domain=domain),
        ]
        out = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["rows"])]
        text = refusal(saved(tmp_path, model(nodes, outputs=out, domains=[domain] if domain else [])))
        assert operator in text
        assert "the_node" in text
        assert "export the model again" in text

    def test_max_length_beyond_the_positions(self, tmp_path):
        with pytest.raises(UnsupportedModelError, match="max_length=0"):
            import_file(saved(tmp_path, model()), ImportOptions(max_length=0))
