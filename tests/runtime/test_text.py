"""Text to token ids."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from turbo_tvm.errors import ArtifactError, InputError
from turbo_tvm.runtime.text import TextTokenizer, max_tokens

WORDS = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}


def tokenizer(special: bool = True) -> Tokenizer:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return made


def test_one_array_of_ids_and_types_per_text():
    ids, types = TextTokenizer(tokenizer().to_str(), 10)(["a b", "b other a"])
    assert [i.tolist() for i in ids] == [[1, 3, 4, 2], [1, 4, 0, 3, 2]]
    assert [t.tolist() for t in types] == [[0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert {a.dtype for a in (*ids, *types)} == {np.dtype("int32")}


def test_long_texts_are_cut_and_special_tokens_stay():
    ids, _ = TextTokenizer(tokenizer().to_str(), 5)(["a " * 50, "b"])
    assert [i.tolist() for i in ids] == [[1, 3, 3, 3, 2], [1, 4, 2]]


def test_settings_in_the_file_do_not_apply():
    """Files are often saved with padding and a short truncation."""
    made = tokenizer()
    made.enable_padding(length=8)
    made.enable_truncation(3)
    ids, _ = TextTokenizer(made.to_str(), 6)(["a", "b b b b b b"])
    assert [len(i) for i in ids] == [3, 6]
    assert max_tokens(made.to_str()) == 3
    assert max_tokens(tokenizer().to_str()) is None


def test_any_iterable_of_strings():
    tokenize = TextTokenizer(tokenizer().to_str(), 10)
    for texts in (["a"], ("a",), iter(["a"]), np.array(["a"])):
        assert [i.tolist() for i in tokenize(texts)[0]] == [[1, 3, 2]]
    assert tokenize([])[0] == []


def test_pairs_and_texts_together():
    made = tokenizer(special=False)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    ids, types = TextTokenizer(made.to_str(), 10)([("a", "b a"), "b"])
    assert [i.tolist() for i in ids] == [[1, 3, 2, 4, 3, 2], [1, 4, 2]]
    assert [t.tolist() for t in types] == [[0, 0, 0, 1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("texts", ["a", None, 5, [b"a"], ["a", None], [["a"]], [("a",)], [("a", 1)], [("a", "b", "c")]])
def test_what_is_no_list_of_strings(texts):
    with pytest.raises(InputError, match="a list of strings is needed"):
        TextTokenizer(tokenizer().to_str(), 10)(texts)


@pytest.mark.parametrize("text", ["", "[", "{}", json.dumps({"model": {"type": "none"}})])
def test_damaged(text):
    with pytest.raises(ArtifactError, match="the tokenizer cannot be read"):
        TextTokenizer(text, 10)


def test_a_text_without_tokens_gives_an_empty_array():
    assert [len(i) for i in TextTokenizer(tokenizer(special=False).to_str(), 10)(["", "a"])[0]] == [0, 1]
