"""What a folder's files say of texts: the ids are those of transformers' AutoTokenizer, whichever files say it."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import transformers
from tiny_text_models import VOCABULARY
from tiny_text_models import tokenizer as word_piece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from turbo_tvm.artifact.manifest import TextRule
from turbo_tvm.errors import InputError, UnsupportedModelError
from turbo_tvm.frontends.text_files import TextFiles, lowercased, read_text_files
from turbo_tvm.runtime.text import TextTokenizer

TEXTS = ["the cat sat", "The CAT ran on a Mat", "dog", "Élan  ΣΟΦΟΣ [SEP] <new> x", "the dog ran on the mat " * 9, ""]
PAIRS = [("the cat", "THE dog ran " * 9), ("a " * 30, "b")]
MARKED = ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*MARKED, *alphabet, "th", "the"])}, [("t", "h"), ("th", "e")])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    made.add_special_tokens(MARKED)
    return made


def unigram() -> Tokenizer:
    pieces = [*MARKED, "▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁cat"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.add_special_tokens(MARKED)
    return made


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[UNK]", "[PAD]"])
    return made


KINDS = {"word pieces": word_piece, "bytes": byte_level, "unigrams": unigram, "words": word_level}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
SAID = {
    "nothing": {},
    "left": {"truncation_side": "left", "model_max_length": 12},
    "no types": {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": 7},
    "a token": {"added_tokens_decoder": {"120": AddedToken("<new>").__getstate__()}, "model_max_length": 10**30},
    "types": {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "truncation_side": "right"},
}


def folder(place: Path, kind: str, config: dict | None = None, **files: dict) -> Path:
    place.mkdir(exist_ok=True)
    KINDS[kind]().save(str(place / "tokenizer.json"))
    if config is not None:
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    for name, values in files.items():
        (place / f"{name}.json").write_text(json.dumps(values))
    return place


def ids_of(files: TextFiles, texts: list, longest: int) -> tuple[list, list]:
    ids, types = TextTokenizer(files.tokenizer, longest, files.rule)(texts)
    return [list(row) for row in ids], [list(row) for row in types]


def ids_of_transformers(place: Path, texts: list, longest: int) -> tuple[list, list]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
    made = [
        tokenizer(*([text] if isinstance(text, str) else text), truncation=True, max_length=longest) for text in texts
    ]
    return [one["input_ids"] for one in made], [one.get("token_type_ids", [0] * len(one["input_ids"])) for one in made]


@pytest.mark.parametrize(("kind", "said"), [*itertools.product(KINDS, SAID)])
def test_ids_are_those_of_transformers(tmp_path, kind, said):
    place = folder(tmp_path / "model", kind, PLAIN | SAID[said])
    files = read_text_files(place)
    longest = files.longest or 16
    for texts in (TEXTS, PAIRS):
        assert ids_of(files, texts, longest) == ids_of_transformers(place, texts, longest)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", None])
def test_the_class_of_the_model_may_say_something_too(tmp_path, model_type, lowercase):
    place = folder(tmp_path / "model", "word pieces", {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase})
    if model_type is not None:
        (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert ids_of(read_text_files(place), TEXTS, 16) == ids_of_transformers(place, TEXTS, 16)


@pytest.mark.parametrize("said", [name for name in SAID if name != "a token"])
def test_without_transformers_the_same(tmp_path, monkeypatch, said):
    place = folder(tmp_path / "model", "word pieces", PLAIN | SAID[said])
    wanted = read_text_files(place)
    monkeypatch.setitem(sys.modules, "transformers", None)
    got = read_text_files(place)
    assert (got.longest, got.rule) == (wanted.longest, wanted.rule)
    assert ids_of(got, TEXTS, 16) == ids_of(wanted, TEXTS, 16)


@pytest.mark.parametrize("lowercase", [True, False])
def test_without_transformers_casing_is_that_of_the_configuration(tmp_path, monkeypatch, lowercase):
    place = folder(tmp_path / "model", "word pieces", {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase})
    wanted = ids_of_transformers(place, TEXTS, 16)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert ids_of(read_text_files(place), TEXTS, 16) == wanted


def test_without_transformers_tokens_that_lack_are_refused(tmp_path, monkeypatch):
    place = folder(tmp_path / "model", "word pieces", PLAIN | SAID["a token"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json adds tokens .* such as '<new>': install"):
        read_text_files(place)


def test_a_vocabulary_becomes_a_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    files = read_text_files(tmp_path)
    assert ids_of(files, TEXTS, 16) == ids_of_transformers(tmp_path, TEXTS, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_lowercase_comes_first_and_once(kind):
    plain = KINDS[kind]()
    text = plain.to_str()
    lowered = TextTokenizer(lowercased(text), 64)(["THE Cat"])[0][0]
    assert list(lowered) == plain.encode("the cat").ids
    assert lowercased(lowercased(text)) == lowercased(text)


SENTENCE_FILES = [
    f"sentence_{kind}_config" for kind in ("bert", "roberta", "distilbert", "xlm-roberta", "xlnet", "albert")
]


@pytest.mark.parametrize("name", SENTENCE_FILES)
def test_sentence_transformers_old_names(tmp_path, name):
    place = folder(tmp_path / "model", "bytes", PLAIN | {"model_max_length": 40})
    assert read_text_files(place).longest == 40
    (place / f"{name}.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    files = read_text_files(place)
    assert files.longest == 20 and ids_of(files, ["THE"], 20) == ids_of(files, ["the"], 20)
    (place / f"{name}.json").write_text('{"max_seq_length": null, "do_lower_case": false}')
    assert read_text_files(place).longest == 40


def test_prompts(tmp_path):
    said = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    place = folder(tmp_path / "model", "word pieces", PLAIN, config_sentence_transformers=said)
    files = read_text_files(place)
    assert (files.rule.prompts, files.rule.default_prompt, files.rule.pools_prompt) == (said["prompts"], "query", True)
    tokenizer = TextTokenizer(files.tokenizer, 16, files.rule)
    assert tokenizer.prompted(["a", ("b", "c")]) == ["query: a", ("b", "c")]
    assert tokenizer.prompted(["a"], "document") == ["a"]
    with pytest.raises(InputError, match="the model has no prompt 'passage'; it has query, document"):
        tokenizer.prompted(["a"], "passage")
    left_out = TextTokenizer(files.tokenizer, 16, TextRule(prompts=said["prompts"], pools_prompt=False))
    assert left_out.prompted(["a"], "document") == left_out.prompted(["a"]) == ["a"]
    with pytest.raises(InputError, match="the prompt 'query' is left out of the pooling"):
        left_out.prompted(["a"], "query")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"prompts": {"query": 5}}, "prompts is to be an object of texts by name"),
        ({"prompts": ["query"]}, "prompts is to be an object of texts by name"),
        ({"prompts": {"a": "b"}, "default_prompt_name": "c"}, "default_prompt_name is 'c'; there are a"),
    ],
)
def test_prompts_that_cannot_be(tmp_path, said, message):
    place = folder(tmp_path / "model", "words", PLAIN, config_sentence_transformers=said)
    with pytest.raises(UnsupportedModelError, match=message):
        read_text_files(place)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"[]", b"{}", b'{"model": 5}'])
def test_a_damaged_tokenizer(tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json cannot be read"):
        read_text_files(tmp_path)
