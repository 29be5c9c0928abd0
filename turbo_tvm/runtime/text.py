"""The tokenizer that an artifact carries: from text to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from turbo_tvm.errors import ArtifactError, InputError, TurboError

if TYPE_CHECKING:
    import tokenizers

Text = str | tuple[str, str]  # a pair is two texts of one request, as cross-encoders compare them


def is_text(value: object) -> bool:
    """Return whether it is a text or a pair of texts."""
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
        self._whole: tokenizers.Tokenizer | None = None
        self._text = text

    def __call__(self, texts: Iterable[Text]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return (token_ids, token_type_ids), one int32 array (length,) each per text or pair of texts."""
        encodings = self.encodings(texts)
        ids = [np.array(e.ids, np.int32) for e in encodings]
        return ids, [np.array(e.type_ids, np.int32) for e in encodings]

    def encodings(self, texts: Iterable[Text], *, special_tokens: bool = True, truncate: bool = True) -> list[Any]:
        """Return the `tokenizers.Encoding` of each text or pair of texts; what was cut off is its `overflowing`.

        special_tokens: add those of the model, such as [CLS]. truncate: cut at the model's longest sequence.
        Raises InputError for what is no list of texts.
        """
        listed = None if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if listed is None or not all(is_text(text) for text in listed):
            raise InputError("a list of strings is needed, or of pairs of strings, which are tuples")
        tokenizer = self._tokenizer if truncate else self._untruncated()
        try:
            return tokenizer.encode_batch(listed, add_special_tokens=special_tokens)
        except Exception as error:  # a surrogate without its other half, for one, which is no UTF-8
            raise InputError(f"the text cannot be tokenised: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Raises InputError."""
        try:
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except Exception as error:
            raise InputError(f"the token ids cannot be decoded: {error}") from error

    def _untruncated(self) -> tokenizers.Tokenizer:
        """Return a second tokenizer that does not truncate, since truncation is part of a tokenizer's state."""
        if self._whole is None:
            import tokenizers

            self._whole = tokenizers.Tokenizer.from_str(self._text)
            self._whole.no_padding()
            self._whole.no_truncation()
        return self._whole


def max_tokens(tokenizer_json: str) -> int | None:
    """Return the truncation length that a `tokenizer.json` was saved with, if any."""
    truncation = json.loads(tokenizer_json).get("truncation")
    return int(truncation["max_length"]) if truncation else None
