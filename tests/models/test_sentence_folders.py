"""Folders of sentence-transformers: the vectors of its own `encode`, from weights and from ONNX, in the engine too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from tiny_text_models import classifier_folder, config, tokenizer

import turbo_tvm

TEXTS = ["the cat sat", "THE Cat", "dog", "a dog ran on the mat in the park " * 8]
SAID = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "[PAD]",
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    """A BERT with a tokenizer that keeps case, as transformers writes it."""
    import transformers

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("encoder")
    transformers.BertModel(config(), add_pooling_layer=False).save_pretrained(folder)
    made = tokenizer()
    made.normalizer = None
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SAID | {"model_max_length": 20}))
    return folder


@pytest.fixture
def saved(encoder_folder, tmp_path) -> Callable[..., tuple[Path, SentenceTransformer]]:
    """`saved(modules, lowercase=False, said={}, **options)`: a folder, and what sentence-transformers loads of it."""

    def make(*modules: Any, lowercase: bool = False, said: dict | None = None, **options: Any):
        source = Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))
        (source / "tokenizer_config.json").write_text(json.dumps(SAID | {"model_max_length": 20} | (said or {})))
        first = Transformer(str(source), do_lower_case=lowercase)
        SentenceTransformer(modules=[first, *modules], device="cpu", **options).save_pretrained(str(tmp_path / "model"))
        return tmp_path / "model", SentenceTransformer(str(tmp_path / "model"), device="cpu")

    return make


def agree(got: list, wanted: np.ndarray) -> None:
    assert max(float(np.abs(a - b).max()) for a, b in zip(got, wanted, strict=True)) < 1e-5


class Hidden(torch.nn.Module):
    """What an exporter takes: positional inputs, one output."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)["last_hidden_state"]


def as_onnx(folder: Path, model: SentenceTransformer) -> Path:
    """The same folder with an ONNX file in the place of the encoder's weights."""
    twin = Path(shutil.copytree(folder, folder.with_name("twin")))
    (twin / "model.safetensors").unlink()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.randint(5, 40, (2, 7))
    torch.onnx.export(
        Hidden(model[0].model.eval()),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        str(twin / "model.onnx"),
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in (*names, "last_hidden_state")},
        dynamo=False,
    )
    return twin


CASES = {
    "a default prompt": (
        lambda: [Pooling(32, "mean"), Normalize()],
        {"prompts": {"query": "the dog ", "document": ""}, "default_prompt_name": "query"},
    ),
    "lower case, cut on the left, no types": (
        lambda: [Pooling(32, "cls")],
        {"lowercase": True, "said": {"truncation_side": "left", "model_input_names": ["input_ids", "attention_mask"]}},
    ),
    "two poolings and what follows": (
        lambda: [
            Pooling(32, ("mean", "max")),
            Dense(64, 24),
            LayerNorm(24),
            Dense(24, 24, use_residual=True),
            Normalize(),
        ],
        {},
    ),
    "a weighted mean": (lambda: [Pooling(32, "weightedmean")], {}),
    "the last token": (lambda: [Pooling(32, "lasttoken")], {}),
    "square roots": (lambda: [Pooling(32, "mean_sqrt_len_tokens")], {"said": {"model_max_length": 10**30}}),
}
SLOW = ("a weighted mean", "the last token", "square roots")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_vectors_are_those_of_sentence_transformers(saved, case):
    modules, options = CASES[case]
    torch.manual_seed(2)
    folder, reference = saved(*modules(), **options)
    wanted = reference.encode(TEXTS)
    for path in (folder, as_onnx(folder, reference)):
        model = turbo_tvm.compile(path, progress=False)
        agree(model.encode(TEXTS), wanted)
        for name in options.get("prompts", ()):
            agree(model.encode(TEXTS, prompt_name=name), reference.encode(TEXTS, prompt_name=name))
    with turbo_tvm.Engine(model) as engine:
        agree([engine.infer_sync(text) for text in TEXTS], wanted)


@pytest.mark.parametrize("labels", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_cross_encoder_that_was_saved_again(tmp_path, labels):
    source = classifier_folder(tmp_path / "source", labels)
    CrossEncoder(str(source), device="cpu", max_length=12).save_pretrained(str(tmp_path / "again"))
    reference = CrossEncoder(str(tmp_path / "again"), device="cpu")
    pairs = [("the cat", "dog ran"), ("red", "a dog ran on the mat " * 9)]
    wanted = reference.predict(pairs, activation_fn=torch.nn.Identity())
    model = turbo_tvm.compile(tmp_path / "again", progress=False)
    assert [len(ids) for ids in model.tokenize(pairs)[0]][1] == 12
    agree([np.ravel(scores) for scores in model.encode(pairs)], np.reshape(wanted, (2, labels)))
