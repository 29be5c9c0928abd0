"""The tokenizer that an artifact carries: from text to token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from turbo_tvm.artifact.manifest import TextRule
from turbo_tvm.errors import ArtifactError, InputError, TurboError
from turbo_tvm.runtime.long_texts import LongTexts, Side, Text

if TYPE_CHECKING:
    import tokenizers


def is_text(value: object) -> bool:
    """Return whether it is a text or a pair of texts."""
    if isinstance(value, str):
        return True
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


@dataclass(frozen=True)
class TextOptions:
    """What a request may ask for; what is None is as the model's files say."""

    prompt_name: str | None = None  # of the prompt that is put before texts
    cut: Side | None = None  # the end at which a text that is too long loses tokens


AS_THE_MODEL = TextOptions()


class TextTokenizer:
    """A Hugging Face `tokenizer.json`, set to truncate at the model's longest sequence and never to pad."""

    def __init__(self, text: str, max_length: int, rule: TextRule = TextRule()):
        self._text, self._max_length, self._rule = text, max_length, rule
        self._made: dict[Side | None, tokenizers.Tokenizer] = {}  # by the end that is cut; None: not at all
        self._long = LongTexts(lambda: self._cutting(None), max_length)
        self._cutting(rule.cut)  # what cannot be read is said at once

    def __call__(
        self, texts: Iterable[Text], options: TextOptions = AS_THE_MODEL
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return (token_ids, token_type_ids), one int32 array (length,) each per text or pair of texts."""
        encodings = self.encodings(self.prompted(texts, options.prompt_name), cut=options.cut)
        return [np.array(e.ids, np.int32) for e in encodings], [self.type_ids(e) for e in encodings]

    def prompted(self, texts: Iterable[Text], prompt_name: str | None = None) -> list[Text]:
        """Return the texts with a prompt before each; pairs of texts have none.

        prompt_name: of one of the model's prompts; None for the model's default, if it has one.

        Raises InputError for a name that the model does not know, and for what is no list of texts.
        """
        rule, listed = self._rule, _listed(texts)
        name = rule.default_prompt if prompt_name is None else prompt_name
        if name is None:
            return listed
        if name not in rule.prompts:
            known = ", ".join(rule.prompts) or "none"
            raise InputError(f"the model has no prompt {name!r}; it has {known}")
        prompt = rule.prompts[name]
        if prompt and not rule.pools_prompt:
            raise InputError(f"the prompt {name!r} is left out of the pooling (include_prompt), which is not supported")
        return [prompt + text if isinstance(text, str) else text for text in listed]

    def type_ids(self, encoding: tokenizers.Encoding) -> np.ndarray:
        """Return the token types that the model takes with an encoding, int32 (length,)."""
        types = encoding.type_ids
        return np.array(types, np.int32) if self._rule.token_types else np.zeros(len(types), np.int32)

    def encodings(self, texts: Iterable[Text], *, cut: Side | None = None) -> list[tokenizers.Encoding]:
        """Return the encoding of each text or pair of texts, cut at the model's longest sequence.

        What was cut off is an encoding's `overflowing`; not all of it, where a text is very long.

        cut: the end that is cut; None for that of the model.

        Raises InputError for what is no list of texts.
        """
        side = cut or self._rule.cut
        tokenizer = self._cutting(side)
        return _tokenised(_listed(texts), lambda listed: self._long.encode(tokenizer, listed, side))

    def whole_encodings(self, texts: Iterable[Text], special_tokens: bool = True) -> list[tokenizers.Encoding]:
        """Return the encoding of each text or pair of texts, with nothing cut off.

        special_tokens: add those of the model, such as [CLS].

        Raises InputError for what is no list of texts.
        """
        tokenizer = self._cutting(None)
        return _tokenised(
            _listed(texts), lambda listed: tokenizer.encode_batch(listed, add_special_tokens=special_tokens)
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Raises InputError."""
        try:
            return self._cutting(self._rule.cut).decode(list(ids), skip_special_tokens=skip_special_tokens)
        except Exception as error:
            raise InputError(f"the token ids cannot be decoded: {error}") from error

    def _cutting(self, side: Side | None) -> tokenizers.Tokenizer:
        """Return a tokenizer that cuts at that end, or not at all: truncation is part of a tokenizer's state."""
        if side not in self._made:
            made = _tokenizer(self._text)
            made.no_padding()
            if side is None:
                made.no_truncation()
            else:
                made.enable_truncation(self._max_length, direction=side)
            self._made[side] = made
        return self._made[side]


def _tokenizer(text: str) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise TurboError("text input needs the package tokenizers: pip install tokenizers") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise ArtifactError(f"the tokenizer cannot be read: {error}") from error


def _tokenised(texts: list[Text], encode: Callable[[list[Text]], list[Any]]) -> list[Any]:
    try:
        return encode(texts)
    except Exception as error:  # a surrogate without its other half, for one, which is no UTF-8
        raise InputError(f"the text cannot be tokenised: {error}") from error


def _listed(texts: Iterable[Text]) -> list[Text]:
    listed = None if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if listed is None or not all(is_text(text) for text in listed):
        raise InputError("a list of strings is needed, or of pairs of strings, which are tuples")
    return listed


def max_tokens(tokenizer_json: str) -> int | None:
    """Return the truncation length that a `tokenizer.json` was saved with, if any."""
    truncation = json.loads(tokenizer_json).get("truncation")
    return int(truncation["max_length"]) if truncation else None
