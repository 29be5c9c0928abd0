"""Which importer a model goes to, and what is said where its packages are missing. No model is imported."""

from __future__ import annotations

import sys

import pytest
import torch

from turbo_tvm.errors import CompileError, UnsupportedModelError
from turbo_tvm.frontends.importer import import_model, onnx_file
from turbo_tvm.frontends.options import ImportOptions

OPTIONS = ImportOptions(name="a name")


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the importers are asked, instead of importing it."""

    calls: list[tuple] = []
    for module, name in (
        ("onnx.model", "import_file"),
        ("torch.folder", "import_folder"),
        ("torch.module", "import_module"),
    ):
        importer = sys.modules[f"turbo_tvm.frontends.{module}"]
        monkeypatch.setattr(importer, name, lambda model, options, name=name: calls.append((name, model, options)))
    return calls


def test_a_module(asked):
    module = torch.nn.Linear(1, 1)
    import_model(module, OPTIONS)
    assert asked == [("import_module", module, OPTIONS)]


def test_a_folder(asked, tmp_path):
    import_model(str(tmp_path), OPTIONS)
    assert asked == [("import_folder", tmp_path, OPTIONS)]


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx"])
def test_a_folder_with_an_onnx_file(asked, tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.touch()
    import_model(tmp_path, OPTIONS)
    assert asked == [("import_file", path, OPTIONS)] and onnx_file(tmp_path) == path


def test_an_onnx_file(asked, tmp_path):
    path = tmp_path / "any name.onnx"
    path.touch()
    import_model(path, OPTIONS)
    assert asked == [("import_file", path, OPTIONS)] and onnx_file(path) == path


def test_weights_for_pytorch_come_before_an_onnx_file(asked, tmp_path):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "model.safetensors").touch()
    import_model(tmp_path)
    assert asked == [("import_folder", tmp_path, ImportOptions())] and onnx_file(tmp_path) is None


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"there is no model at .*missing"):
        import_model(tmp_path / "missing")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UnsupportedModelError, match=r"weights\.bin is a file; an ONNX file .* or a model folder"):
        import_model(tmp_path / "weights.bin")


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_pytorch(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for model in (object(), tmp_path):
        with pytest.raises(
            CompileError, match=r"needs PyTorch and transformers \(.*\): pip install 'turbo-tvm\[torch\]'"
        ):
            import_model(model)


def test_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CompileError, match=r"compiling ONNX files needs onnx \(.*\): pip install 'turbo-tvm\[onnx\]'"):
        import_model(tmp_path)
