"""Formats of numbers: every question about a dtype has one answer."""

from __future__ import annotations

import pytest
import tvm

from turbo_tvm.ops import formats
from turbo_tvm.ops.formats import BF16, FORMATS, FP16, FP32, Format

every_format = pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)


def itemsize(dtype: str) -> int:
    return tvm.DataType(dtype).itemsize


@every_format
def test_a_format_is_found_by_its_name_and_by_its_storage(known: Format):
    assert formats.by_name(known.name) is known
    assert formats.of_storage(known.storage) is known
    assert formats.of_words(known.storage) is known
    assert formats.per_element(known.storage) == 1


@every_format
def test_a_word_is_as_large_as_the_numbers_that_it_holds(known: Format):
    assert (known.word is None) == (known.per_word == 1)
    if known.word is not None:
        assert itemsize(known.word) == known.per_word * itemsize(known.storage)
        assert formats.of_words(known.word) is known
        assert formats.per_element(known.word) == known.per_word


def test_dtypes_mean_what_the_kernels_take_them_for():
    assert (FP32.storage, FP16.storage, BF16.storage) == ("float32", "float16", "uint16")
    assert (BF16.word, BF16.per_word) == ("int32", 2)


def test_formats_are_told_apart():
    dtypes = [dtype for known in FORMATS for dtype in (known.storage, known.word) if dtype is not None]
    assert len(set(dtypes)) == len(dtypes)
    assert len({known.name for known in FORMATS}) == len(FORMATS)


def test_other_dtypes_are_no_format():
    for dtype in ("int64", "int8", "bool", "bfloat16"):
        assert formats.of_storage(dtype) is None and formats.of_words(dtype) is None
        assert formats.per_element(dtype) == 1


def test_ids_are_no_rows():
    """Though words of packed weights have their dtype."""
    assert formats.of_storage(formats.INDEX) is None


@pytest.mark.parametrize("name", ["float32", "uint16", "", "FP32"])
def test_a_name_of_no_format_is_refused(name):
    with pytest.raises(KeyError):
        formats.by_name(name)
