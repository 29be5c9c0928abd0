"""Encoders through ONNX: the same kernels and answers as from PyTorch, whatever exporter wrote the file."""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_models
import pytest
import torch
from benchmark.onnx_files import OnnxFiles

import turbo_tvm
from turbo_tvm.compiler import pipeline, targets
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.importer import import_model
from turbo_tvm.frontends.onnx.model import import_file
from turbo_tvm.frontends.options import ImportOptions
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.frontends.torch.sentence import SentenceEncoder
from turbo_tvm.schedules.cpu.tiles import cpu_tiles

DYNAMO_TOO = ("bert", "roberta", "mpnet")

# Whose parts others have too: a file of the newer exporter takes 4 to 7 s of a core to write, a compile 5 s.
SLOW_FILES = (
    ("roberta", True),
    ("bert", True),
    ("roberta", False),
    ("distilbert", False),
    ("albert", False),
    ("electra", False),
)
SLOW_MODELS = ("roberta", "distilbert", "albert", "electra")
SLOW_MODERN = ("modernbert", "nomic", "eurobert", "clip text", "clip vision", "deberta")


def some_slow(names, slow) -> list:
    """The names as parameters, some of them marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


FILES = [
    pytest.param(
        *(family, dynamo),
        id=f"{family}-{'dynamo' if dynamo else 'torchscript'}",
        marks=[pytest.mark.slow] if (family, dynamo) in SLOW_FILES else [],
    )
    for family in onnx_models.FAMILIES
    for dynamo in (False, True)
    if not dynamo or family in DYNAMO_TOO  # the others' are the same files but for their layers
]


def kernels(imported: Imported) -> Counter[str]:
    """The kernels that a model calls and how often; fails if its padding was not removed."""
    optimized = pipeline.optimize(imported.mod, cpu_tiles(targets.resolve("cpu")), imported.request_limits.max_length)
    assert optimized.declined == ()
    return Counter({kernel.name: kernel.calls for kernel in optimized.kernels})


@pytest.fixture
def files(shared) -> Callable[[str, bool], tuple[torch.nn.Module, Path]]:
    """`files(family, dynamo)`: the model and its ONNX file, exported once per run."""
    return lambda family, dynamo: onnx_models.exported(shared, family, dynamo=dynamo)


@pytest.fixture
def of_pytorch(shared) -> Callable[..., Counter[str]]:
    """`of_pytorch(family, longest=None)`: the kernels of a model that is imported from PyTorch."""

    def get(family: str, longest: int | None = None) -> Counter[str]:
        build = partial(onnx_models.build, family)
        return kernels(shared.imported(f"onnx {family}", build, ImportOptions(max_length=longest)))

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


@pytest.mark.parametrize(("family", "dynamo"), FILES)
def test_the_kernels_are_those_of_pytorch(files, of_pytorch, family, dynamo):
    _, path = files(family, dynamo)
    assert kernels(import_file(path)) == of_pytorch(family)


@pytest.mark.parametrize("family", some_slow(onnx_models.FAMILIES, SLOW_MODELS))
def test_every_length_agrees_with_pytorch_in_one_batch(files, family):
    model, path = files(family, family in DYNAMO_TOO)
    assert largest_difference(path, model, 64) < 1e-4


@pytest.mark.parametrize("family", some_slow(onnx_models.MODERN, SLOW_MODERN))
def test_the_kernels_of_modern_families_are_those_of_pytorch(files, of_pytorch, family):
    _, path = files(family, True)
    longest = None if "vi" in family else 64
    assert kernels(import_file(path, ImportOptions(max_length=longest))) == of_pytorch(family, longest)


@pytest.mark.parametrize(
    ("pooling", "dynamo"),
    [
        ("mean", True),
        ("cls", False),
        pytest.param("mean", False, marks=pytest.mark.slow),
        pytest.param("cls", True, marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.parametrize("opset", [11, pytest.param(17, marks=pytest.mark.slow)])
def test_other_opsets(tmp_path, opset):
    model = onnx_models.build("bert")
    model.set_attn_implementation("eager")  # PyTorch exports the other from opset 14 on
    path = onnx_models.export(model, tmp_path / "bert.onnx", dynamo=False, opset=opset)
    assert kernels(import_file(path)) == kernels(import_module(model))


def test_the_attention_operator_of_opset_23(of_pytorch, tmp_path):
    path = onnx_models.export(onnx_models.build("bert"), tmp_path / "bert.onnx", dynamo=True, opset=23)
    assert "Attention" in {node.op_type for node in onnx.load(path).graph.node}
    assert kernels(import_file(path)) == of_pytorch("bert")


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torchscript", "dynamo"])
def test_fixed_dimensions_become_any_batch_and_length(of_pytorch, tmp_path, dynamo):
    model = onnx_models.build("bert")
    path = onnx_models.export(model, tmp_path / "bert.onnx", dynamo=dynamo, shape=(1, 24), fixed=True)
    imported = import_file(path)
    assert imported.request_limits.max_length == 24
    assert kernels(imported) == of_pytorch("bert", 24)
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
        assert imported.samples

    def test_skip_layer_norm_and_bias_gelu(self, files, of_pytorch, tmp_path):
        from onnxruntime.transformers import optimizer

        _, plain = files("bert", False)
        path = tmp_path / "bert.onnx"
        fused = optimizer.optimize_model(str(plain), "bert", num_heads=2, hidden_size=32, opt_level=0)
        fused.save_model_to_file(str(path))
        found = {node.op_type for node in onnx.load(path).graph.node if node.domain == "com.microsoft"}
        assert {"SkipLayerNormalization", "BiasGelu"} <= found
        assert kernels(import_file(path)) == of_pytorch("bert")

    def test_the_runtimes_extended_optimisation(self, files, of_pytorch):
        import onnxruntime

        _, path = files("bert", True)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path.with_name("extended.onnx"))  # its weights stay where they are
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        assert kernels(import_file(path.with_name("extended.onnx"))) == of_pytorch("bert")


class TestAgreement:
    def test_without_onnx_runtime_the_reference_answers(self, files, monkeypatch):
        _, path = files("distilbert", False)
        (by_runtime, *longer) = import_file(path).samples
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
        by_reference = import_file(path).samples[0]
        assert [sample.mask.sum() for sample in longer] == []  # the model takes no more tokens than the first has
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
        imported = import_model(folder)
        assert imported.name == "my-distilbert"
        assert imported.request_limits.max_length == 48

    def test_names_and_bounds(self, files):
        _, path = files("roberta", False)
        imported = import_file(path)
        assert imported.name == "script"
        assert imported.positions == turbo_tvm.artifact.manifest.PositionRule("count_non_pad", 1, 1)
        assert imported.request_limits.max_length == 64
        assert imported.request_limits.vocab_size == 101
        assert imported.request_limits.type_vocab_size == 1
        assert os.fspath(path).endswith("script.onnx")
