"""From text to token ids, with the tokenizer that an artifact carries."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from turbo_tvm.errors import ArtifactError, InputError, TurboError

Text = str | tuple[str, str]  # a pair is two texts of one request, as cross-encoders compare them


def is_text(value: object) -> bool:
    """Whether it is a text or a pair of texts."""
    if isinstance(value, str):
        return True
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


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

    def __call__(self, texts: Iterable[Text]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(token_ids, token_type_ids), one int32 array (length,) per text or pair of texts."""
        listed = None if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if listed is None or not all(is_text(text) for text in listed):
            raise InputError("a list of strings is needed, or of pairs of strings, which are tuples")
        encodings = self._tokenizer.encode_batch(listed)
        ids = [np.array(e.ids, np.int32) for e in encodings]
        return ids, [np.array(e.type_ids, np.int32) for e in encodings]


def max_tokens(tokenizer_json: str) -> int | None:
    """The truncation length that a `tokenizer.json` was saved with, if any."""
    truncation = json.loads(tokenizer_json).get("truncation")
    return int(truncation["max_length"]) if truncation else None
