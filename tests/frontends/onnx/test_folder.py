"""Folders as optimum writes them: what belongs to an ONNX file."""

from __future__ import annotations

import json

import pytest
from tiny_text_models import VOCABULARY, tokenizer

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.onnx.folder import beside, file_in
from turbo_tvm.frontends.text_files import TextFiles


@pytest.fixture(params=["model.onnx", "onnx/model.onnx"])
def path(request, tmp_path):
    made = tmp_path / "my-model" / request.param
    made.parent.mkdir(parents=True)
    made.touch()
    return made


@pytest.fixture
def folder(tmp_path, path):
    return tmp_path / "my-model"


def test_the_file_of_a_folder(folder, path):
    assert file_in(folder) == path
    assert file_in(path.parent / "nothing") is None


def test_weights_for_pytorch_come_first(folder, path):
    (folder / "model.safetensors").touch()
    assert file_in(folder) is None


def test_nothing_beside(path):
    found = beside(path)
    assert (found.name, found.texts, found.modules) == ("my-model", TextFiles(), None)


def test_a_file_with_a_name_of_its_own(path):
    assert beside(path.with_name("bert.onnx")).name == "bert"


def test_tokenizer_and_longest_sequence(folder, path):
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 512}))
    assert json.loads(beside(path).texts.tokenizer)["model"]["vocab"]["the"] == VOCABULARY.index("the")
    assert beside(path).texts.longest == 512
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128}))
    assert beside(path).texts.longest == 128
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 1024}))
    assert beside(path).texts.longest == 512


def test_modules_of_sentence_transformers(folder, path):
    kinds = ("Transformer", "Pooling", "Normalize")
    listed = [{"path": "", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))  # of Pooling, whose path is "" here
    found = beside(path).modules
    assert (found.pooling, found.normalize, found.then) == (("cls",), True, ())


@pytest.mark.parametrize("text", ["{}", '{"max_position_embeddings": "512"}', '{"max_position_embeddings": -1}'])
def test_a_configuration_that_says_nothing(folder, path, text):
    (folder / "config.json").write_text(text)
    assert beside(path).texts.longest is None


@pytest.mark.parametrize(
    ("named", "labels"),
    [
        ({"0": "cat", "1": "dog"}, ("cat", "dog")),
        ({"1": "dog", "0": "cat"}, ("cat", "dog")),
        ({"0": "cat", "2": "dog"}, ()),
        ({"0": "cat", "1": 7}, ()),
        (["cat"], ()),
    ],
    ids=str,
)
def test_labels(folder, path, named, labels):
    (folder / "config.json").write_text(json.dumps({"id2label": named}))
    assert beside(path).labels == labels


def test_a_broken_configuration(folder, path):
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"config\.json cannot be read"):
        beside(path)


def test_a_tokenizer_that_cannot_be_read(folder, path):
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        beside(path)
