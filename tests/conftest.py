"""Tiny random models, compiled once per process: hidden 32, 2 layers, 2 heads, 101 words, at most 64 tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_text_models import SPECIAL, WORDS, config, tokenizer

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

LETTERS = "abcdefghijklmnop"
VOCABULARY = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
MAX_LENGTH = 40


@dataclass(frozen=True)
class Served:
    """A PyTorch module and what turbo_tvm compiled from it."""

    module: Any
    compiled: Any


def _bert() -> Any:
    import transformers

    return transformers.BertModel(transformers.BertConfig(**SIZES))


def _roberta() -> Any:
    import transformers

    sizes = SIZES | {"max_position_embeddings": 66}
    return transformers.RobertaModel(transformers.RobertaConfig(**sizes, type_vocab_size=1), add_pooling_layer=False)


def _mpnet() -> Any:
    import transformers

    sizes = SIZES | {"max_position_embeddings": 66}
    return transformers.MPNetModel(transformers.MPNetConfig(**sizes), add_pooling_layer=False)


def _mean() -> Any:
    from turbo_tvm.frontends.torch.sentence import SentenceEncoder

    return SentenceEncoder(_bert(), "mean", normalize=True)


def _answers() -> Any:
    import transformers

    return transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES))


def _vit() -> Any:
    """Images of 32 x 48 in patches of 8 x 8: 25 tokens."""
    import transformers

    sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=(32, 48), patch_size=8))


def _clip_text() -> Any:
    """Texts end at the token 7."""
    import transformers

    ends = {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 1}
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**SIZES, **ends, projection_dim=24))


def _padded() -> Any:
    """The largest value of every column over the sequence, which no pass recognises."""
    import torch

    class LargestOverTime(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = _bert()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)["last_hidden_state"]
            largest = hidden.masked_fill(attention_mask.unsqueeze(-1) == 0, -1e9).max(1).values
            return {"last_hidden_state": hidden, "largest": largest}

    return LargestOverTime()


MODELS: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "roberta": _roberta,
    "mpnet": _mpnet,
    "mean": _mean,
    "answers": _answers,
    "vit": _vit,
    "clip_text": _clip_text,
    "padded": _padded,
}


@pytest.fixture(scope="session")
def served() -> Callable[[str], Served]:
    """`served(name)`: one of MODELS. Mark what uses it `xdist_group("served")`: a compile takes seconds."""
    import torch

    import turbo_tvm

    made: dict[str, Served] = {}

    def get(name: str) -> Served:
        if name not in made:
            torch.manual_seed(0)
            module = MODELS[name]().eval()
            made[name] = Served(module, turbo_tvm.compile(module, progress=False))
        return made[name]

    return get


@pytest.fixture(scope="session")
def random_requests() -> Callable[..., list[list[np.ndarray]]]:
    """`random_requests(count, seed=0)`: ragged requests of 1 to 9 sequences of 1 to 64 tokens."""

    def make(count: int, seed: int = 0) -> list[list[np.ndarray]]:
        rng = np.random.default_rng(seed)
        return [
            [rng.integers(0, 101, length, "int32") for length in rng.integers(1, 65, rng.integers(1, 10))]
            for _ in range(count)
        ]

    return make


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
