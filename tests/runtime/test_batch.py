"""Packing and its checks: properties over random ragged batches, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo_tvm.errors import InputError
from turbo_tvm.runtime import batch as packing
from turbo_tvm.runtime.manifest import Bounds, PositionRule

BOUNDS = Bounds(max_length=512, vocab_size=100, type_vocab_size=2)
ARANGE = PositionRule("arange", 0)
LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=40)


def from_padded(ids, mask=None, types=None, *, contiguous=False, first_token=False, rule=ARANGE):
    return packing.from_padded(ids, mask, types, BOUNDS, rule, contiguous=contiguous, first_token=first_token)


@given(LENGTHS, st.sampled_from([4, 6, 12]))
def test_packed_rows_hold_every_token_once_and_only_the_last_tile_has_room(lengths, row_tile):
    parts = [np.arange(n, dtype=np.int32) + i for i, n in enumerate(lengths)]
    rows = packing.pack_rows(parts, row_tile)
    total = sum(lengths)
    assert rows.shape == (packing.row_tiles(np.array(lengths), row_tile), row_tile)
    assert 0 <= rows.size - total < row_tile
    np.testing.assert_array_equal(rows.reshape(-1)[:total], np.concatenate(parts))
    assert not rows.reshape(-1)[total:].any()


@given(LENGTHS, st.sampled_from([8, 16, 32]))
def test_query_tiles_cover_every_row_of_every_sequence_exactly_once(lengths, query_tile):
    array = np.array(lengths)
    cu = packing.boundaries(array)
    tiles = packing.query_tiles(array, query_tile)
    covered = [row for first, _, end in tiles for row in range(first, min(first + query_tile, end))]
    assert covered == list(range(sum(lengths)))
    assert {(b, e) for _, b, e in tiles.tolist()} == set(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    assert all(begin <= first < end for first, begin, end in tiles)


def test_positions_count_from_the_offset():
    np.testing.assert_array_equal(packing.position_ids(PositionRule("arange", 2), np.array([7, 8, 9])), [2, 3, 4])


def test_positions_skip_pad_tokens_as_roberta_does():
    rule = PositionRule("count_non_pad", 1, 1)
    np.testing.assert_array_equal(packing.position_ids(rule, np.array([5, 1, 6, 1, 7])), [2, 1, 3, 1, 4])


def test_right_and_left_padding_keep_the_matrix_positions():
    ids = np.array([[5, 6, 0], [0, 7, 8]])
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    batch = from_padded(ids, mask)
    assert [s.tolist() for s in batch.token_ids] == [[5, 6], [7, 8]]
    assert [p.tolist() for p in batch.positions] == [[0, 1], [1, 2]]
    assert [c.tolist() for c in batch.columns] == [[0, 1], [1, 2]]


def test_a_mask_with_holes_is_packed_unless_the_model_looks_at_distances():
    ids, mask = np.array([[5, 6, 7]]), np.array([[1, 0, 1]])
    assert from_padded(ids, mask).positions[0].tolist() == [0, 2]
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
        packing.from_sequences(sequences, None, BOUNDS, ARANGE)


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
        packing.from_sequences([[1, 2], [3]], types, BOUNDS, ARANGE)


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
        assert from_padded(ids, mask).token_ids[0].tolist() == [5, 6]
