"""The checks of requests: what is accepted as it is, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.artifact.manifest import PositionRule, RequestLimits
from turbo_tvm.errors import InputError
from turbo_tvm.runtime import validation

BOUNDS = RequestLimits(max_length=512, vocab_size=100, type_vocab_size=2)
ARANGE = PositionRule("arange", 0)


def from_padded(ids, mask=None, types=None, *, contiguous=False, first_token=False, rule=ARANGE):
    return validation.from_padded(ids, mask, types, BOUNDS, rule, contiguous=contiguous, first_token=first_token)


def test_right_and_left_padding_keep_the_matrix_positions():
    ids = np.array([[5, 6, 0], [0, 7, 8]])
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    batch = from_padded(ids, mask)
    assert batch.token_ids.tolist() == [5, 6, 7, 8] and batch.cu_seqlens.tolist() == [0, 2, 4]
    assert batch.positions.tolist() == [0, 1, 1, 2]
    assert [c.tolist() for c in batch.columns] == [[0, 1], [1, 2]]


def test_a_mask_with_holes_is_packed_unless_the_model_looks_at_distances():
    ids, mask = np.array([[5, 6, 7]]), np.array([[1, 0, 1]])
    assert from_padded(ids, mask).positions.tolist() == [0, 2]
    with pytest.raises(InputError, match="has holes"):
        from_padded(ids, mask, contiguous=True)


def test_a_hidden_first_token_is_refused_by_models_that_pool_it():
    with pytest.raises(InputError, match="hides its first token"):
        from_padded(np.array([[0, 7, 8]]), np.array([[0, 1, 1]]), first_token=True)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "the request is empty"),
        ([[]], "sequence 0 is empty"),
        ([[1], []], "sequence 1 is empty"),
        ([[1, 100]], "token id 100 is out of range.*100 entries"),
        ([[-1]], "token id -1 is out of range"),
        ([[2**40]], "out of range"),
        ([np.array([2**64 - 1], np.uint64)], "token id 18446744073709551615 is out of range"),
        ([[1], np.array([5, 2**63], np.uint64)], "sequence 1: token id 9223372036854775808 is out of range"),
        ([[1], [101], []], "sequence 1: token id 101 is out of range"),
        ([[1], [], [101]], "sequence 1 is empty"),
        ([[1.5]], "holds float64 values"),
        ([[True, False]], "holds bool values"),
        ([["a"]], "token ids are integers"),
        ([[[1, 2]]], r"has shape \(1, 2\)"),
        ([[1, [2]]], "not a list of integers"),
        ([1, 2], r"has shape \(\)"),
        ([[1] * 513], "has 513 tokens; the model allows 512"),
        ("text", "a list of token id sequences is needed, not str"),
        (7, "a list of token id sequences is needed, not int"),
    ],
)
def test_bad_sequences_are_refused_with_what_is_wrong(sequences, message):
    with pytest.raises(InputError, match=message):
        validation.from_sequences(sequences, None, BOUNDS, ARANGE)


def test_sequences_of_every_integer_type_go_together():
    ids = [np.array([5], np.uint64), [6], np.array([7, 8], np.int8), (9,), np.arange(6)[::3]]
    assert validation.from_sequences(ids, None, BOUNDS, ARANGE).token_ids.tolist() == [5, 6, 7, 8, 9, 0, 3]


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ([[0]], "1 token_type_ids for 2 sequences"),
        ([[0, 0], [0, 0]], r"token_type_ids 1 has shape \(2,\)"),
        ([[0, 2], [0]], "type 2 is out of range"),
        ([[0, 0.5], [0]], "holds float64"),
    ],
)
def test_bad_token_types_are_refused(types, message):
    with pytest.raises(InputError, match=message):
        validation.from_sequences([[1, 2], [3]], types, BOUNDS, ARANGE)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((0, 4), int), None, "input_ids is empty"),
        (np.zeros((2, 0), int), None, "input_ids is empty"),
        (np.zeros(3, int), None, r"a \(batch, length\) matrix is needed"),
        (np.zeros((1, 513), int), None, "513 tokens wide"),
        (np.zeros((1, 2)), None, "holds float64"),
        (np.zeros((1, 2), int), np.ones((1, 3), int), "attention_mask has shape"),
        (np.zeros((1, 2), int), np.zeros((1, 2), int), "is all zeros"),
        (np.zeros((1, 2), int), np.array([[1, 2]]), "other than 0 and 1"),
        (np.zeros((1, 2), int), np.array([[0.0, -1e9]]), "other than 0 and 1"),
    ],
)
def test_bad_matrices_are_refused(ids, mask, message):
    with pytest.raises(InputError, match=message):
        from_padded(ids, mask)


def test_bool_and_float_masks_of_zeros_and_ones_are_masks():
    ids = np.array([[5, 6, 7]])
    for mask in (np.array([[True, True, False]]), np.array([[1.0, 1.0, 0.0]])):
        assert from_padded(ids, mask).token_ids.tolist() == [5, 6]


@pytest.mark.parametrize("rule", [ARANGE, PositionRule("count_non_pad", 1, 1), PositionRule("none")])
@pytest.mark.parametrize("ids", [[5], [1, 1, 7], np.arange(9, dtype=np.uint16), (3, 4)])
def test_one_sequence_is_a_list_of_one(ids, rule):
    one, listed = (
        validation.from_sequence(ids, None, BOUNDS, rule),
        validation.from_sequences([ids], None, BOUNDS, rule),
    )
    for found, right in zip(one[:4], listed[:4], strict=True):
        np.testing.assert_array_equal(found, right)
        assert found.dtype == right.dtype


@pytest.mark.parametrize(
    "wrong", [[], [100], [-1], [0.5], [[1]], [1] * 513, None, "ids", [None], [2**70], [True], [[1], [2, 3]], {1: 2}]
)
def test_one_sequence_that_is_wrong_is_refused_as_in_a_list(wrong):
    with pytest.raises(InputError) as listed:
        validation.from_sequences([wrong], None, BOUNDS, ARANGE)
    with pytest.raises(InputError) as one:
        validation.from_sequence(wrong, None, BOUNDS, ARANGE)
    assert str(one.value) == str(listed.value)


def test_one_sequence_is_copied():
    ids = np.array([1, 2, 3], np.int32)
    kept = validation.from_sequence(ids, None, BOUNDS, ARANGE)
    ids[0] = 9
    assert kept.token_ids[0] == 1
