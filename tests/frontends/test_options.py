"""What a caller may ask for."""

from __future__ import annotations

import pytest

from turbo_tvm.artifact.manifest import TextRule
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.options import ImportOptions, read_tokenizer, size_of
from turbo_tvm.frontends.text_files import TextFiles


def test_what_is_asked_for_comes_before_what_the_model_says():
    files = TextFiles('{"added_tokens": []}', 9, TextRule("left", False, {"query": "q: "}, "query"))
    own = '{"truncation": {"direction": "Right"}}'
    assert ImportOptions("name", 5, own, image_size=16).or_else("other", files) == ImportOptions(
        "name", 5, own, TextRule("right", True, {"query": "q: "}, "query"), 9, 16
    )
    made = ImportOptions(image_size=16).or_else("other", files)
    assert made == ImportOptions("other", None, files.tokenizer, files.rule, 9, 16)
    assert ImportOptions(max_length=0).or_else("other", files).max_length == 0  # is refused, rather than forgotten


@pytest.mark.parametrize(("size", "pair"), [(16, (16, 16)), ((2, 3), (2, 3)), ([2, 3], (2, 3))])
def test_sizes(size, pair):
    assert size_of(size) == pair


@pytest.mark.parametrize("size", [0, -1, (16,), (1, 2, 3), (16, 0), (16, "a"), (1.5, 2)])
def test_other_sizes(size):
    with pytest.raises(UnsupportedModelError, match="in pixels, or one number for both, not"):
        size_of(size)


def test_tokenizers(tiny_folder, tmp_path):
    assert read_tokenizer(None) is None
    path = tiny_folder / "tokenizer.json"
    assert read_tokenizer(path) == read_tokenizer(str(path)) == path.read_text()


@pytest.mark.parametrize("text", [None, b"\xff\xfe\x00", b"{}", b"[", b""])
def test_tokenizers_that_cannot_be_used(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UnsupportedModelError, match=r"the tokenizer .*tokenizer\.json cannot be used: "):
        read_tokenizer(path)
