"""Groups of a batch: in order, whole, no larger than they may be, and no smaller than they must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo_tvm.errors import MemoryBudgetError
from turbo_tvm.runtime.batch import Batch, cu_seqlens_of
from turbo_tvm.runtime.grouping import by_memory, by_tokens, longest_that_fits

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def batch_of(lengths: list[int]) -> Batch:
    ids = np.arange(sum(lengths), dtype=np.int32)
    return Batch(ids, ids, ids, cu_seqlens_of(lengths))


class Memory:
    """A byte per token."""

    def __init__(self, budget: int):
        self.budget = budget

    def fits(self, lengths):
        return sum(lengths) <= self.budget

    def check_memory(self, lengths):
        if not self.fits(lengths):
            raise MemoryBudgetError("too much")


def check(batch: Batch, groups: list[Batch]) -> None:
    np.testing.assert_array_equal(np.concatenate([g.token_ids for g in groups]), batch.token_ids)
    np.testing.assert_array_equal(np.concatenate([g.lengths for g in groups]), batch.lengths)


@given(LENGTHS, st.integers(1, 100))
def test_by_tokens(lengths, most):
    groups = list(by_tokens(batch_of(lengths), most))
    check(batch_of(lengths), groups)
    assert all(len(g.lengths) == 1 or len(g.token_ids) <= most for g in groups)
    firsts = [int(g.lengths[0]) for g in groups[1:]]
    assert all(len(g.token_ids) + first > most for g, first in zip(groups, firsts, strict=False))


@given(LENGTHS, st.integers(60, 200))
def test_by_memory(lengths, budget):
    groups = list(by_memory(batch_of(lengths), Memory(budget)))
    check(batch_of(lengths), groups)
    assert all(len(g.token_ids) <= budget for g in groups)
    assert len(groups) == 1 or sum(lengths) > budget


def test_a_sequence_that_does_not_fit():
    with pytest.raises(MemoryBudgetError):
        list(by_memory(batch_of([3, 50, 2]), Memory(49)))


@given(st.integers(1, 1000), st.integers(0, 1200))
def test_the_longest_that_fits(most, budget):
    assert longest_that_fits(most, Memory(budget).fits) == max(1, min(most, budget))
