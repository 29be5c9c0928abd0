"""Rotary position embedding: spans of heads that turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo_tvm.ops import Rotary
from turbo_tvm.ops.operand import Operand
from turbo_tvm.ops.rotary import joined_spans

Spans = list[tuple[int, int]]


@pytest.mark.parametrize(
    ("spans", "joined"),
    [
        ([], ()),
        ([(0, 2)], ((0, 2),)),
        ([(0, 2), (8, 2)], ((0, 4),)),  # q, and k behind it
        ([(8, 2), (0, 2)], ((0, 4),)),
        ([(0, 2), (12, 1)], ((0, 2), (12, 1))),  # something lies between
        ([(0, 1), (4, 1), (8, 1), (16, 2)], ((0, 3), (16, 2))),
        ([(0, 2), (9, 2)], ((0, 2), (9, 2))),  # one column between
    ],
)
def test_heads_that_follow_each_other_are_one_span(spans, joined):
    assert joined_spans(spans, head_dim=4) == joined


@st.composite
def disjoint_spans(draw) -> tuple[Spans, int]:
    """Spans of heads that do not overlap, in any order, and the width of a head."""
    head_dim, spans, end = draw(st.integers(1, 8)), [], 0
    for gap, heads in draw(st.lists(st.tuples(st.sampled_from([0, 0, 1, 3, 8]), st.integers(1, 4)), max_size=8)):
        spans.append((end + gap, heads))
        end += gap + heads * head_dim
    return draw(st.permutations(spans)), head_dim


def heads_of(spans, head_dim: int) -> list[int]:
    """The first column of every head."""
    return sorted(first + i * head_dim for first, heads in spans for i in range(heads))


@given(disjoint_spans())
def test_joined_spans_are_the_same_heads_in_as_few_spans_as_possible(case):
    spans, head_dim = case
    joined = joined_spans(spans, head_dim)
    assert heads_of(joined, head_dim) == heads_of(spans, head_dim)
    assert list(joined) == sorted(joined)
    ends = [first + heads * head_dim for first, heads in joined]
    assert all(end < first for end, (first, _) in zip(ends, joined[1:], strict=False))
    assert joined_spans(joined, head_dim) == joined
    assert joined_spans(sorted(spans), head_dim) == joined


def test_a_rotary_says_what_its_table_is():
    rows = Operand.rows(24, row_tile=4)
    rotary = Rotary(
        x=rows,
        position_ids=Operand((None, 4), "int32"),
        table=Operand((512, 6), "float32"),
        columns=20,
        head_dim=8,
        spans=((0, 1), (12, 1)),
        out=rows,
    )
    assert (rotary.positions, rotary.dims, rotary.columns_out) == (512, 6, 20)
    assert rotary.kernel_name() == "rotary_20_1at0_1at12x8_turned6_max512_from24_to24"
