"""Packing: properties over random ragged batches."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from turbo_tvm.artifact.manifest import PooledToken, PositionRule, RequestLimits
from turbo_tvm.runtime import batch as packing
from turbo_tvm.runtime import validation

BOUNDS = RequestLimits(max_length=512, vocab_size=100, type_vocab_size=2)
ARANGE = PositionRule("arange", 0)
LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=40)


@given(LENGTHS, st.sampled_from([4, 6, 12]))
def test_packed_rows_hold_every_token_once_and_only_the_last_tile_has_room(lengths, row_tile):
    values = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    rows = packing.pack_rows(values, row_tile)
    assert rows.shape == (packing.row_tile_count(len(values), row_tile), row_tile)
    assert 0 <= rows.size - len(values) < row_tile
    np.testing.assert_array_equal(rows.reshape(-1)[: len(values)], values)
    assert not rows.reshape(-1)[len(values) :].any()


@given(LENGTHS, st.sampled_from([8, 16, 32]))
def test_query_tiles_cover_every_row_of_every_sequence_exactly_once(lengths, query_tile):
    cu = packing.cu_seqlens_of(lengths)
    tiles = packing.query_tiles(cu, query_tile)
    assert cu.dtype == tiles.dtype == np.int32
    covered = [row for first, _, end in tiles for row in range(first, min(first + query_tile, end))]
    assert covered == list(range(sum(lengths)))
    assert {(b, e) for _, b, e in tiles.tolist()} == set(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
    assert all(begin <= first < end for first, begin, end in tiles)


@given(LENGTHS, st.sampled_from([ARANGE, PositionRule("arange", 2), PositionRule("count_non_pad", 1, 3)]))
def test_a_batch_holds_what_its_sequences_hold(lengths, rule):
    rng = np.random.default_rng(sum(lengths))
    ids = [rng.integers(0, 5, n, np.uint8) for n in lengths]
    types = [rng.integers(0, 2, n) for n in lengths]
    batch = validation.from_sequences(ids, types, BOUNDS, rule)
    assert all(x.dtype == np.int32 for x in batch[:4]) and batch.lengths.tolist() == lengths
    np.testing.assert_array_equal(batch.token_ids, np.concatenate(ids))
    np.testing.assert_array_equal(batch.token_type_ids, np.concatenate(types))
    np.testing.assert_array_equal(batch.positions, np.concatenate([packing.position_ids(rule, s) for s in ids]))


@given(LENGTHS, st.data())
def test_a_part_of_a_batch_is_the_batch_of_those_sequences(lengths, data):
    start = data.draw(st.integers(0, len(lengths) - 1))
    end = data.draw(st.integers(start + 1, len(lengths)))
    ids = [[i % 100] * n for i, n in enumerate(lengths)]
    part = validation.from_sequences(ids, None, BOUNDS, ARANGE).part(start, end)
    wanted = validation.from_sequences(ids[start:end], None, BOUNDS, ARANGE)
    for one, other in zip(part[:4], wanted[:4], strict=True):
        np.testing.assert_array_equal(one, other)


def test_positions_count_from_the_offset():
    np.testing.assert_array_equal(packing.position_ids(PositionRule("arange", 2), np.array([7, 8, 9])), [2, 3, 4])


def test_positions_skip_pad_tokens_as_roberta_does():
    rule = PositionRule("count_non_pad", 1, 1)
    np.testing.assert_array_equal(packing.position_ids(rule, np.array([5, 1, 6, 1, 7])), [2, 1, 3, 1, 4])


@given(LENGTHS)
def test_joined_sequences_are_those_of_one_list(lengths):
    rng = np.random.default_rng(len(lengths))
    ids = [rng.integers(0, 100, n) for n in lengths]
    types = [rng.integers(0, 2, n) for n in lengths]
    for rule in (ARANGE, PositionRule("count_non_pad", 1, 1)):
        whole = validation.from_sequences(ids, types, BOUNDS, rule)
        parts = [validation.from_sequence(i, t, BOUNDS, rule) for i, t in zip(ids, types, strict=True)]
        joined = packing.join(parts)
        for found, right in zip(joined[:4], whole[:4], strict=True):
            np.testing.assert_array_equal(found, right)
            assert found.dtype == right.dtype == np.int32


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_query_tiles_of_long_sequences_come_first_where_asked(lengths):
    cu = packing.cu_seqlens_of(lengths)
    plain, sorted_tiles = (packing.query_tiles(cu, 64, longest_first=first) for first in (False, True))
    assert sorted(map(tuple, plain)) == sorted(map(tuple, sorted_tiles))
    keys = sorted_tiles[:, 2] - sorted_tiles[:, 1]
    assert (np.diff(keys) <= 0).all()


def test_pooled_rows_are_those_of_the_first_such_token():
    ids, cu = np.array([5, 7, 9, 7, 1, 2, 9, 9], np.int32), packing.cu_seqlens_of([4, 2, 2])
    for rule, rows in ((PooledToken("first_of", 7), [1, 4, 6]), (PooledToken("largest"), [2, 5, 6])):
        found = packing.pooled_rows(rule, ids, cu)
        assert found.dtype == np.int32 and found.shape == (4,)
        assert found[:3].tolist() == rows  # the second sequence has no 7
