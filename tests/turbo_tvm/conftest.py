"""A tiny random BERT, as a model folder with a tokenizer and as an artifact; each is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_text_models import SPECIAL, WORDS, config, tokenizer

LETTERS = "abcdefghijklmnop"
VOCABULARY = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
MAX_LENGTH = 40


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: hidden 32, 1 layer, 2 heads, 50 words, at most 40 tokens."""
    import torch
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    BertModel(config(VOCABULARY, MAX_LENGTH)).save_pretrained(folder)
    tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_folder`, compiled for this machine and saved."""
    import turbo_tvm

    path = tmp_path_factory.mktemp("artifacts") / "tiny.turbo"
    turbo_tvm.compile(tiny_folder).save(path)
    return path
