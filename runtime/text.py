"""From text to token ids, with the tokenizer that an artifact carries."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from turbo_tvm.errors import ArtifactError, InputError, TurboError


class TextTokenizer:
    """A Hugging Face `tokenizer.json`, set to truncate at the model's longest sequence and never to pad."""

    def __init__(self, text: str, max_length: int):
        try:
            import tokenizers
        except ImportError as error:
            raise TurboError("text input needs the package tokenizers: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises bare Exception
            raise ArtifactError(f"the tokenizer cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def __call__(self, texts: Iterable[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(token_ids, token_type_ids), one int32 array (length,) per text."""
        listed = None if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if listed is None or not all(isinstance(text, str) for text in listed):
            raise InputError("a list of strings is needed")
        encodings = self._tokenizer.encode_batch(listed)
        ids = [np.array(e.ids, np.int32) for e in encodings]
        return ids, [np.array(e.type_ids, np.int32) for e in encodings]


def max_tokens(tokenizer_json: str) -> int | None:
    """The truncation length that a `tokenizer.json` was saved with, if any."""
    truncation = json.loads(tokenizer_json).get("truncation")
    return int(truncation["max_length"]) if truncation else None
