"""Tensors of the Open Inference Protocol, there and back; and what is no tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from turbo_tvm.server.errors import Problem
from turbo_tvm.server.tensors import BYTES, DTYPES, Tensor, from_bytes, from_values, texts, to_bytes

numbers = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: arrays.arrays(
        DTYPES[name],
        arrays.array_shapes(max_dims=3, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if name.startswith("FP") else None,
    )
)


@given(numbers)
def test_numbers_there_and_back(array):
    one = Tensor("x", array)
    back = from_bytes("x", one.datatype, array.shape, to_bytes(one))
    np.testing.assert_array_equal(back.array, array)
    again = from_values("x", one.datatype, array.shape, array.tolist())
    assert again.array.dtype == array.dtype
    np.testing.assert_array_equal(again.array, array)


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_texts_there_and_back(strings):
    array = np.empty(len(strings), object)
    array[:] = [text.encode() for text in strings]
    raw = to_bytes(Tensor("x", array))
    assert texts(from_bytes("x", BYTES, [len(strings)], raw)) == strings
    assert texts(from_values("x", BYTES, [len(strings), 1], [[text] for text in strings])) == strings


@given(st.binary(max_size=40), st.integers(0, 4))
def test_any_bytes_are_strings_or_a_problem(raw, count):
    try:
        found = from_bytes("x", BYTES, [count], raw)
    except Problem:
        return
    assert to_bytes(found) == raw


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "words"),
    [
        ("INT64", [2], [1], "2 values"),
        ("INT64", [1], [1.5], "no list of INT64"),
        ("INT64", [1], ["1"], "no list of INT64"),
        ("INT64", [1], [2**70], "INT64"),
        ("INT8", [1], [200], "out of range"),
        ("UINT8", [1], [-1], "out of range"),
        ("FP32", [1], [float("nan")], "out of range"),
        ("INT64", [2, 2], [[1, 2], [3]], "no list of INT64"),
        ("INT64", [1], [None], "no list of INT64"),
        ("INT64", [1], [""] * 30_000 + ["x" * 100_000], "no numbers"),  # 12 GB as NumPy would have it
        ("INT64", [1], [{}], "no list of INT64"),
        ("BYTES", [1], [1], "strings"),
        ("FLOAT", [1], [1], "datatype 'FLOAT'"),
        ("INT64", [-1], [1], "shape"),
        ("INT64", [1] * 9, [1], "shape"),
        ("INT64", [2**31, 2**31], [1], "values"),
    ],
)
def test_what_is_no_tensor(datatype, shape, values, words):
    with pytest.raises(Problem, match=words) as caught:
        from_values("x", datatype, shape, values)
    assert caught.value.kind.status == 400


def test_bytes_of_another_size():
    with pytest.raises(Problem, match="takes 8 bytes, not 7"):
        from_bytes("x", "INT32", [2], b"1234567")
    with pytest.raises(Problem, match="UTF-8"):
        texts(from_bytes("x", BYTES, [1], b"\x01\x00\x00\x00\xff"))
