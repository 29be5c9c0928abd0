"""Files of fixed dimensions: which numbers stand for batch and length. Pure arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import tirx

from turbo_tvm.frontends.onnx.fixed import Loosen

B, S = tirx.Var("batch", "int64"), tirx.Var("length", "int64")


def same(got, wanted) -> bool:
    """Extents are equal: numbers, symbols and products of them."""
    return len(got) == len(wanted) and all(str(g) == str(w) for g, w in zip(got, wanted, strict=True))


def loosen(batch: int | None = 2, length: int | None = 24) -> Loosen:
    return Loosen((B, S), (batch, length))


def test_a_file_that_fixes_nothing_is_left_alone():
    for each in (Loosen((B, S)), loosen(None, None)):
        assert each.cut((1, 24)) == ([], [])
        assert each.shape([2, 24]) == [2, 24] and each.reshape([B, S, 4], [0, 24, 2, 2]) == [0, 24, 2, 2]
        assert not each.is_length(24) and each.all_tokens(np.arange(48), [B, S]) is None


def test_constants_are_cut_along_every_axis_of_the_length():
    axes, stops = loosen().cut((1, 24, 24, 8))
    assert axes == [1, 2] and same(stops, [S, S])
    assert loosen(2, 1).cut((1, 1)) == ([], [])  # a length of 1 may be anything


def test_shapes_of_constants():
    assert same(loosen().shape([2, 24, 8]), [B, S, 8])
    assert same(loosen(1).shape([1, 24]), [1, S])  # broadcasts as it is
    assert same(loosen().shape([24, 2]), [S, 2])  # the batch comes first alone


def test_the_length():
    assert loosen().is_length(24) and not loosen().is_length(23) and not loosen(2, 1).is_length(1)


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        ([B, S, 32], [2, 24, 4, 8], [B, S, 4, 8]),
        ([B, S, 32], [0, 24, 4, 8], [0, S, 4, 8]),
        ([B, S, 4, 8], [2, -1, 32], [B, -1, 32]),
        ([B, S, 32], [48, 32], [B * S, 32]),
        ([B, 4, S, 8], [8, 24, 8], [B * 4, S, 8]),
        ([4, 8], [2, 24], [2, 24]),  # the source has neither
        ([B, S, 32], [B, 24, 32], [B, S, 32]),  # the batch is given
    ],
    ids=str,
)
def test_targets_of_reshapes(source, target, wanted):
    assert same(loosen().reshape(source, target), wanted)


def test_a_batch_of_one_merges_in_front_alone():
    assert same(loosen(1).reshape([B, S, 32], [24, 32]), [B * S, 32])
    assert same(loosen(1).reshape([B, S, 32], [1, 24, 32]), [B, S, 32])


def test_a_look_up_of_every_token_in_its_place():
    ids = np.arange(48).reshape(2, 24)
    assert same(loosen().all_tokens(ids, [B * S, 8]), [B, S, 8])
    assert loosen().all_tokens(ids[:, ::-1], [B * S, 8]) is None
    assert loosen().all_tokens(ids, [S, 8]) is None
    assert loosen().all_tokens(ids[:1], [B * S, 8]) is None
