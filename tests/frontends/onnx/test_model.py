"""Encoders through ONNX: the same kernels and answers as from PyTorch, whatever exporter wrote the file."""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_models
import pytest
import torch
from benchmark.onnx_files import OnnxFiles

import turbo_tvm
from turbo_tvm.compiler import compile as compiler
from turbo_tvm.compiler import pipeline, targets
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.onnx.model import import_file
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.frontends.torch.sentence import SentenceEncoder
from turbo_tvm.schedules.cpu.tiles import cpu_tiles

pytestmark = pytest.mark.xdist_group("onnx")
DYNAMO_TOO = ("bert", "roberta", "mpnet")


def kernels(imported: Imported) -> Counter[str]:
    """The kernels that a model calls and how often; fails if its padding was not removed."""
    optimized = pipeline.optimize(imported.mod, cpu_tiles(targets.resolve("cpu")), imported.bounds.max_length)
    assert optimized.declined == ()
    return Counter({kernel.name: kernel.calls for kernel in optimized.kernels})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`files(family, dynamo)`: the model and its ONNX file, exported once."""
    made = {}

    def get(family: str, dynamo: bool) -> tuple[torch.nn.Module, Path]:
        if (family, dynamo) not in made:
            path = tmp_path_factory.mktemp(family) / f"{'dynamo' if dynamo else 'script'}.onnx"
            model = onnx_models.build(family)
            made[family, dynamo] = model, onnx_models.export(model, path, dynamo=dynamo)
        return made[family, dynamo]

    return get


def largest_difference(path: Path, model: torch.nn.Module, longest: int) -> float:
    """Between the compiled file and the model, for sequences of every length up to `longest` in one batch."""
    compiled = turbo_tvm.compile(path, progress=False)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 101, (longest, longest))
    mask = np.arange(longest)[None, :] < np.arange(1, longest + 1)[:, None]
    with torch.inference_mode():
        wanted = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype("int64")))
    answers = compiled.run(
        [row[:n] for row, n in zip(ids, range(1, longest + 1), strict=True)], output=compiled.manifest.outputs[0].name
    )
    hidden = wanted.last_hidden_state.numpy()
    return max(float(np.abs(a - hidden[i, : i + 1]).max()) for i, a in enumerate(answers))


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("family", onnx_models.FAMILIES)
def test_the_kernels_are_those_of_pytorch(files, family, dynamo):
    if dynamo and family not in DYNAMO_TOO:
        pytest.skip("the same file but for its layers")
    model, path = files(family, dynamo)
    assert kernels(import_file(path)) == kernels(import_module(model))


@pytest.mark.parametrize("family", onnx_models.FAMILIES)
def test_every_length_agrees_with_pytorch_in_one_batch(files, family):
    model, path = files(family, family in DYNAMO_TOO)
    assert largest_difference(path, model, 64) < 1e-4


@pytest.mark.parametrize("family", onnx_models.MODERN)
def test_the_kernels_of_modern_families_are_those_of_pytorch(files, family):
    model, path = files(family, True)
    longest = None if "vi" in family else 64
    assert kernels(import_file(path, max_length=longest)) == kernels(import_module(model, max_length=longest))


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_embeddings(tmp_path, pooling, dynamo):
    model = SentenceEncoder(onnx_models.build("bert"), pooling, normalize=True).eval()
    path = onnx_models.export(model, tmp_path / "model.onnx", dynamo=dynamo)
    assert kernels(import_file(path)) == kernels(import_module(model))


def test_windows_and_rotary_positions_agree_with_pytorch(files):
    model, path = files("modernbert", True)
    assert largest_difference(path, model, 64) < 1e-4


def test_images_agree_with_pytorch(files):
    model, path = files("vit", True)
    compiled = turbo_tvm.compile(path, progress=False)
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(pixel_values=pixels)
    answers = compiled.run(list(pixels.numpy()), output=compiled.manifest.outputs[0].name)
    np.testing.assert_allclose(np.stack(answers), wanted.last_hidden_state.numpy(), atol=1e-4)


@pytest.mark.parametrize("opset", [11, 17])
def test_other_opsets(files, tmp_path, opset):
    model = onnx_models.build("bert")
    model.set_attn_implementation("eager")  # PyTorch exports the other from opset 14 on
    path = onnx_models.export(model, tmp_path / "bert.onnx", dynamo=False, opset=opset)
    assert kernels(import_file(path)) == kernels(import_module(model))


def test_the_attention_operator_of_opset_23(files, tmp_path):
    model, _ = files("bert", False)
    path = onnx_models.export(model, tmp_path / "bert.onnx", dynamo=True, opset=23)
    assert "Attention" in {node.op_type for node in onnx.load(path).graph.node}
    assert kernels(import_file(path)) == kernels(import_module(model))


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_fixed_dimensions_become_any_batch_and_length(files, tmp_path, dynamo):
    model, _ = files("bert", False)
    path = onnx_models.export(model, tmp_path / "bert.onnx", dynamo=dynamo, shape=(1, 24), fixed=True)
    imported = import_file(path)
    assert imported.bounds.max_length == 24
    wanted = kernels(import_module(model, max_length=24))
    assert kernels(imported) == wanted
    if dynamo:
        assert largest_difference(path, model, 24) < 1e-4


class TestRuntimesOwnOperators:
    """Files that ONNX Runtime has optimised."""

    def test_attention_and_embeddings_whole(self, files, tmp_path):
        model = files("bert", False)[0]
        bare = copy.deepcopy(model)
        bare.pooler = None
        path, fused = OnnxFiles(bare, tmp_path).optimised()
        assert {name for name, count in fused.items() if count} == {
            "Attention",
            "BiasGelu",
            "EmbedLayerNormalization",
            "SkipLayerNormalization",
        }
        imported = import_file(Path(path))
        assert kernels(imported) == kernels(import_module(bare))
        assert imported.sample is not None

    def test_skip_layer_norm_and_bias_gelu(self, files, tmp_path):
        from onnxruntime.transformers import optimizer

        model, plain = files("bert", False)
        path = tmp_path / "bert.onnx"
        fused = optimizer.optimize_model(str(plain), "bert", num_heads=2, hidden_size=32, opt_level=0)
        fused.save_model_to_file(str(path))
        found = {node.op_type for node in onnx.load(path).graph.node if node.domain == "com.microsoft"}
        assert {"SkipLayerNormalization", "BiasGelu"} <= found
        assert kernels(import_file(path)) == kernels(import_module(model))

    def test_the_runtimes_extended_optimisation(self, files):
        import onnxruntime

        model, path = files("bert", True)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path.with_name("extended.onnx"))  # its weights stay where they are
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        assert kernels(import_file(path.with_name("extended.onnx"))) == kernels(import_module(model))


class TestAgreement:
    def test_without_onnx_runtime_the_reference_answers(self, files, monkeypatch):
        _, path = files("distilbert", False)
        by_runtime = import_file(path).sample
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
        by_reference = import_file(path).sample
        assert by_runtime is not None
        assert by_reference is not None
        assert max(by_reference.differences(by_runtime.outputs).values()) < 1e-5

    def test_a_model_that_no_pass_knows_is_padded_and_right(self, tmp_path):
        class Largest(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bert = onnx_models.build("bert")

            def forward(self, input_ids, attention_mask):
                hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
                largest = hidden.masked_fill(attention_mask.unsqueeze(-1) == 0, -1e9).max(1).values
                return {"last_hidden_state": hidden, "largest": largest}

        path = onnx_models.export(Largest().eval(), tmp_path / "largest.onnx", dynamo=False)
        compiled = turbo_tvm.compile(path, progress=False)  # compares
        assert compiled.manifest.layout == "padded"
        assert "was not removed" in compiled.manifest.declined[0]

    def test_a_folder_as_optimum_writes_it(self, files, tmp_path):
        _, path = files("distilbert", False)
        folder = tmp_path / "my-distilbert"
        folder.mkdir()
        shutil.copy(path, folder / "model.onnx")
        (folder / "config.json").write_text('{"max_position_embeddings": 48}')
        imported = compiler._import_path(folder, None, None, None, None)
        assert imported.name == "my-distilbert"
        assert imported.bounds.max_length == 48

    def test_names_and_bounds(self, files):
        _, path = files("roberta", False)
        imported = import_file(path)
        assert imported.name == "script"
        assert imported.positions == turbo_tvm.artifact.manifest.PositionRule("count_non_pad", 1, 1)
        assert imported.bounds.max_length == 64
        assert imported.bounds.vocab_size == 101
        assert imported.bounds.type_vocab_size == 1
        assert os.fspath(path).endswith("script.onnx")
