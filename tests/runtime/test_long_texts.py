"""What is cut off a long text is not tokenised, and nobody can tell."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text_models import tokenizer as word_piece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from turbo_tvm.runtime.long_texts import LongTexts

LONGEST = 20


def bytes_of() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet, "ab", "abab", "Ġa"])}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab"), ("Ġ", "a")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def pieces() -> Tokenizer:
    made = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("▁ab", -3.0), *((c, -4.0) for c in "abcdef")], unk_id=0)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A <unk>", pair="$A <unk> $B", special_tokens=[("<unk>", 0)]
    )
    return made


KINDS = {"words": word_piece, "bytes": bytes_of, "pieces": pieces}


def cutting(kind: str, side: str) -> Tokenizer:
    made = KINDS[kind]()
    made.enable_truncation(LONGEST, direction=side)
    return made


def counted(kind: str, side: str, texts: list) -> tuple[list, list, int]:
    """Ids and whether something was cut, by LongTexts; and the characters that were tokenised."""
    tokenizer, seen = cutting(kind, side), [0]

    class Counting:
        def encode(self, *parts):
            seen[0] += sum(map(len, parts))
            return tokenizer.encode(*parts)

        def encode_batch(self, listed):
            return tokenizer.encode_batch(listed)

    found = LongTexts(KINDS[kind], LONGEST).encode(Counting(), texts, side)
    return [one.ids for one in found], [bool(one.overflowing) for one in found], seen[0]


def wanted(kind: str, side: str, texts: list) -> tuple[list, list]:
    found = [cutting(kind, side).encode(*([one] if isinstance(one, str) else one)) for one in texts]
    return [one.ids for one in found], [bool(one.overflowing) for one in found]


parts = st.one_of(
    st.sampled_from([" ", "\n", "\t", "a", "ab", "é", "the cat ", "。", "dog. ", "\r\n"]).flatmap(
        lambda part: st.integers(1, 400).map(lambda many: part * many)
    ),
    st.text(max_size=30),
)
texts = st.lists(parts, max_size=5).map("".join)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@given(listed=st.lists(st.one_of(texts, st.tuples(texts, texts)), max_size=3))
@settings(max_examples=20)
def test_ids_are_those_of_the_whole_text(kind, side, listed):
    ids, cut, _ = counted(kind, side, listed)
    assert (ids, cut) == wanted(kind, side, listed)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_book_some_lines_are_tokenised(kind, side):
    rng = random.Random(0)
    book = " ".join(rng.choice(["the", "cat", "dog.", "ran\n", "on"]) for _ in range(20_000))
    ids, cut, characters = counted(kind, side, [book])
    assert (ids, cut) == wanted(kind, side, [book]) and cut == [True]
    assert characters < 10_000


def test_blanks_are_left_out_where_they_mean_nothing():
    for text in (" " * 1_000_000 + "cat", "cat" + "\n" * 1_000_000 + "dog"):
        ids, cut, characters = counted("words", "right", [text])
        assert (ids, cut) == wanted("words", "right", [text]) and cut == [False]
        assert characters < 200
    assert not LongTexts(bytes_of, LONGEST)._ignores_blanks
