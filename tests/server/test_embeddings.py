"""Arithmetic on vectors and scores: unit length, fewer dimensions, probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.server import errors
from turbo_tvm.server.embeddings import probabilities, shortened, unit
from turbo_tvm.server.errors import Problem


def test_unit_length():
    np.testing.assert_allclose(unit(np.array([3.0, 4.0], np.float32)), [0.6, 0.8], rtol=1e-7)
    for kept in (np.zeros(3, np.float32), np.array([1.0, 1e-4], np.float32)):  # nothing to scale, and only rounding
        assert unit(kept) is kept


def test_fewer_dimensions_have_unit_length_again():
    vectors = [np.array([3.0, 4.0, 12.0], np.float32), np.array([0.0, 2.0, 1.0], np.float32)]
    np.testing.assert_allclose(shortened(vectors, 2), [[0.6, 0.8], [0.0, 1.0]], rtol=1e-7)
    assert all(a is b for a, b in zip(shortened(vectors, None), vectors, strict=True))


@pytest.mark.parametrize("dimensions", [0, -1, 4])
def test_dimensions_that_there_are_not(dimensions):
    with pytest.raises(Problem, match="from 1 to 3") as caught:
        shortened([np.ones(3, np.float32)], dimensions)
    assert caught.value.kind is errors.UNPROCESSABLE and caught.value.param == "dimensions"


def test_probabilities():
    np.testing.assert_allclose(probabilities(np.array([0.0, np.log(3.0)], np.float32)), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(probabilities(np.array([1000.0, 0.0], np.float32)), [1.0, 0.0])
    np.testing.assert_allclose(probabilities(np.array([0.0], np.float32)), [0.5])
    two = np.array([0.0, np.log(3.0)], np.float32)
    np.testing.assert_allclose(probabilities(two, "single_label_classification"), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(probabilities(two, "multi_label_classification"), [0.5, 0.75], rtol=1e-6)
    np.testing.assert_array_equal(probabilities(two, "regression"), two)
