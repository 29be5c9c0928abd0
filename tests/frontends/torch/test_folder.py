"""Model folders: what is read from them, and what is no model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.text_files import TextFiles
from turbo_tvm.frontends.torch.folder import load_folder
from turbo_tvm.frontends.torch.sentence import SentenceEncoder

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "bert"
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A folder with a bare BERT."""
    return Path(shutil.copytree(original, tmp_path / "bert"))


@pytest.fixture
def sentence_folder(folder):
    """`sentence_folder(pooling, *modules)`: a sentence-transformers folder."""

    def make(pooling: dict, *modules: dict) -> Path:
        (folder / "modules.json").write_text(json.dumps(list(modules) or [TRANSFORMER, POOLING]))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return folder

    return make


def test_a_bare_encoder(folder):
    loaded = load_folder(folder)
    assert type(loaded.module) is transformers.BertModel and not loaded.module.training
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.texts == TextFiles()


def test_the_head_that_the_configuration_names(tmp_path):
    config = transformers.BertConfig(**SIZES, num_labels=3)
    transformers.BertForTokenClassification(config).half().save_pretrained(tmp_path)
    model = load_folder(tmp_path).module
    assert type(model) is transformers.BertForTokenClassification
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 16},
            ("mean",),
        ),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, ("cls",)),
        ({"pooling_mode": "mean"}, ("mean",)),
        ({"pooling_mode": ["cls"]}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
        ({}, ("mean",)),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers(sentence_folder, config, pooling, normalize):
    model = load_folder(sentence_folder(config, TRANSFORMER, POOLING, *[NORMALIZE] * normalize)).module
    assert isinstance(model, SentenceEncoder) and type(model.encoder) is transformers.BertModel
    assert (model.pooling, model.normalize) == (pooling, normalize)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"pooling_mode_median_tokens": True},
            r"pooling \['pooling_mode_median_tokens'\] is not supported; cls, max, mean,",
        ),
        ({"pooling_mode": "median"}, r"pooling \['median'\] is not supported"),
        ({"pooling_mode": []}, r"pooling \[\] is not supported"),
    ],
)
def test_other_pooling(sentence_folder, config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        load_folder(sentence_folder(config))


def test_other_modules(sentence_folder):
    pooling = {"pooling_mode": "mean"}
    router = {"path": "2_Router", "type": "sentence_transformers.models.Router"}
    with pytest.raises(UnsupportedModelError, match="the sentence-transformers module 'Router' is not supported"):
        load_folder(sentence_folder(pooling, TRANSFORMER, POOLING, router))
    with pytest.raises(UnsupportedModelError, match=r"modules\.json does not begin with a Transformer"):
        load_folder(sentence_folder(pooling, POOLING))
    with pytest.raises(UnsupportedModelError, match="the sentence-transformers module 'Normalize' is not supported"):
        load_folder(sentence_folder(pooling, TRANSFORMER, NORMALIZE))


def test_a_transformer_alone_is_a_cross_encoder(sentence_folder):
    loaded = load_folder(sentence_folder({}, TRANSFORMER))
    assert type(loaded.module) is transformers.BertModel  # what config.json names


def test_a_dense_module_needs_its_weights(sentence_folder):
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    folder = sentence_folder({"pooling_mode": "mean"}, TRANSFORMER, POOLING, dense)
    with pytest.raises(UnsupportedModelError, match=r"the weights of .*2_Dense cannot be read"):
        load_folder(folder)
    (folder / "2_Dense").mkdir()
    save_file({"other": np.zeros((2, 16), np.float32)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"has no weight linear\.weight; it has other"):
        load_folder(folder)
    (folder / "2_Dense" / "config.json").write_text('{"activation_function": "os.system"}')
    save_file({"linear.weight": np.zeros((2, 16), np.float32)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"the activation 'os\.system' is not one of PyTorch's"):
        load_folder(folder)


def test_no_configuration(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"is not a model folder: it has no config.json; a folder with"):
        load_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\x00"])
def test_damaged_configuration(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"config.json cannot be read"):
        load_folder(folder)


def test_unknown_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "zorro", "architectures": ["AutoModel"]}))
    with pytest.raises(UnsupportedModelError, match="model type 'zorro' cannot be loaded"):
        load_folder(folder)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ZorroModel"]}))
    with pytest.raises(UnsupportedModelError, match="transformers knows no architecture 'ZorroModel'"):
        load_folder(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="model type 'bert' cannot be loaded"):
        load_folder(folder)


def test_damaged_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsupportedModelError, match="model type 'bert' cannot be loaded"):
        load_folder(folder)


def test_weights_of_other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UnsupportedModelError, match="model type 'bert' cannot be loaded"):
        load_folder(folder)


def test_weights_that_are_missing(folder):
    """transformers would make them up."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.0.output.dense.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"has no weights for encoder\.layer\.0\.output\.dense\.weight of"):
        load_folder(folder)


def test_a_pooler_that_was_not_saved_is_left_out(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path)
    model = load_folder(tmp_path).module
    assert model.pooler is None
    assert model(torch.tensor([[5, 6]])).pooler_output is None


def test_tied_weights_are_not_missing(tmp_path):
    saved = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    saved.save_pretrained(tmp_path)
    loaded = load_folder(tmp_path).module
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, saved(ids).logits)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"[]"])
def test_damaged_modules_and_lengths(folder, text):
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).write_bytes(b"{}" if (name, text) == ("modules.json", b"[]") else text)
        with pytest.raises(UnsupportedModelError, match=f"{name} cannot be read"):
            load_folder(folder)
        (folder / name).unlink()


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json cannot be read"):
        load_folder(folder)
