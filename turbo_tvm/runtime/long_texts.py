"""Tokenises texts of many characters without tokenising all of them: what is cut off need not be known.

The tokens that are kept depend on the part of a text that they come from, and on where the tokenizer splits it first,
which is at blanks. So a part that ends at a blank is tokenised; a larger one, if too little of it was cut off to be
sure. Of pairs, long runs of blanks alone are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import tokenizers

Text = str | tuple[str, str]  # a pair is two texts of one request, as cross-encoders compare them
Side = Literal["right", "left"]  # the end at which a text that is too long loses tokens

_CHARACTERS = 16  # per token, of the first part; ordinary text has 3 to 6
_MARGIN = 64  # tokens that must be cut off of a part, as the last ones may be others in the whole text
_GROWTH = 8
_RUN = 64  # blanks in a row, of which a tokenizer that ignores blanks needs no more
_RUNS = re.compile(rf"([ \n\r\t])\1{{{_RUN},}}")


class LongTexts:
    """Tokenises for one tokenizer."""

    def __init__(self, whole: Callable[[], tokenizers.Tokenizer], max_length: int):
        """Begin. whole: gives the tokenizer that cuts nothing. max_length: tokens of a sequence."""
        self._whole, self._first = whole, _CHARACTERS * (max_length + _MARGIN)

    def encode(self, tokenizer: tokenizers.Tokenizer, texts: list[Text], cut: Side) -> list[tokenizers.Encoding]:
        """Return the encodings of texts, as a tokenizer gives them that cuts at this end.

        Of a long text, fewer encodings may be `overflowing` than of the whole; there are some if there are any.
        """
        if all(_size(text) <= self._first for text in texts):
            return tokenizer.encode_batch(texts)
        return [self._encode(tokenizer, text, cut) for text in texts]

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: Text, cut: Side) -> tokenizers.Encoding:
        if self._ignores_blanks and _size(text) > self._first:
            text = _each(text, lambda one: _RUNS.sub(lambda run: run[1] * _RUN, one))
        if not isinstance(text, str):  # how many tokens each of a pair keeps follows from how many both have
            return tokenizer.encode(*text)
        characters = self._first
        while True:
            some = _part(text, characters, cut)
            encoding = tokenizer.encode(some)
            if some == text or sum(len(other.ids) for other in encoding.overflowing) >= _MARGIN:
                return encoding
            characters *= _GROWTH

    @cached_property
    def _ignores_blanks(self) -> bool:
        """Whether many blanks in a row mean what few do, wherever they stand."""
        encode = self._whole().encode
        return all(
            encode(form.format(blank * _RUN)).ids == encode(form.format(blank * many)).ids
            for blank in " \n\r\t"
            for form in ("a{}b", "{}a", "a{}", "a.{}b")
            for many in (_RUN + 1, 3 * _RUN + 1)
        )


def _each(text: Text, change: Callable[[str], str]) -> Text:
    return change(text) if isinstance(text, str) else (change(text[0]), change(text[1]))


def _size(text: Text) -> int:
    return len(text) if isinstance(text, str) else max(map(len, text))


def _part(text: str, characters: int, cut: Side) -> str:
    """Return at most so many characters up to a blank, from the end that is kept; all of it without a blank there."""
    if len(text) <= characters:
        return text
    if cut == "right":
        end = max(text.rfind(" ", 0, characters), text.rfind("\n", 0, characters))
        return text[:end] if end > 0 else text
    blanks = [place for place in (text.find(" ", -characters), text.find("\n", -characters)) if place >= 0]
    return text[min(blanks) :] if blanks else text
