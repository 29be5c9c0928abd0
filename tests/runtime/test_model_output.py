"""Outputs by name, attribute and number; padded again; of the caller's kind of array."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.artifact.manifest import OutputSpec
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.batch import Batch, cu_seqlens_of
from turbo_tvm.runtime.model_output import ModelOutput, like, to_matrix, to_numpy


def test_an_output_has_names_attributes_and_numbers():
    out = ModelOutput(logits=1, hidden=2)
    assert out["logits"] == out.logits == out[0] == 1 and out[1:] == (2,)
    with pytest.raises(AttributeError, match="no output 'scores'; it has logits, hidden"):
        _ = out.scores


def test_rows_go_back_to_their_columns():
    ids = np.zeros(3, np.int32)
    batch = Batch(ids, ids, ids, cu_seqlens_of([2, 1]), columns=(np.array([0, 2]), np.array([1])))
    parts = [np.array([[1.0], [2.0]], np.float32), np.array([[3.0]], np.float32)]
    matrix = to_matrix(OutputSpec("x", "token", 1), parts, batch, (2, 3))
    assert matrix[..., 0].tolist() == [[1, 0, 2], [0, 3, 0]]
    pooled = [np.array([1.0, 2.0], np.float32)] * 2
    assert to_matrix(OutputSpec("x", "sequence", 2), pooled, batch, (2, 3)).tolist() == [[1, 2], [1, 2]]


def test_arrays_are_of_the_caller_s_kind():
    torch = pytest.importorskip("torch")
    array = np.ones(2, np.float32)
    assert like(array, [1]) is array and torch.equal(like(array, torch.zeros(1)), torch.ones(2))
    assert to_numpy(None) is None and to_numpy([1, 2]).tolist() == [1, 2]
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    with pytest.raises(InputError, match="bfloat16 tensor holds no token ids"):
        to_numpy(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"on meta.*call \.cpu\(\) first"):
        to_numpy(torch.ones(2, device="meta"))
