"""Tiny random BERTs with a tokenizer, as the folders that sentence-transformers and transformers write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "park", "fast", "slow", "red", "blue"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
MAX_LENGTH = 48

_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> Tokenizer:
    """WordPiece over these words, which begin with BERT's special tokens."""
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.add_special_tokens(SPECIAL)
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    numbers = [("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=numbers
    )
    return made


def config(vocabulary: Sequence[str] = VOCABULARY, max_length: int = MAX_LENGTH, **more: Any) -> Any:
    """A BERT of hidden 32, 1 layer, 2 heads."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_length,
        **more,
    )


def embedder_folder(folder: Path) -> Path:
    """Mean pooling, unit length, two prompts, the first of which is the default."""
    import torch
    from transformers import BertModel

    torch.manual_seed(1)
    BertModel(config()).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "modules.json").write_text(json.dumps(_MODULES))
    prompts = {"fast": "the fast ", "slow": "the slow "}
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts, "default_prompt_name": "fast"})
    )
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def classifier_folder(folder: Path, labels: int, names: Sequence[str] = ()) -> Path:
    """A classifier of so many labels."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(2)
    named = {"id2label": dict(enumerate(names))} if names else {}
    BertForSequenceClassification(config(num_labels=labels, **named)).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
