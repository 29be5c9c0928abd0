"""Peak memory for the scheduler: never too little, never shrinking, planned for few shapes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_tvm.runtime.memory.peak import PeakBytes


def packed_bytes(lengths):
    return 100 * sum(lengths) + 7 * len(lengths)


def padded_bytes(lengths):
    return 100 * len(lengths) * max(lengths)


lists = st.lists(st.integers(1, 512), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(lists, st.integers(1, 512))
def test_at_least_what_is_needed_and_no_less_for_more(fakes, lengths, more):
    for exact, layout in ((packed_bytes, "packed"), (padded_bytes, "padded")):
        asked = []

        def noted(shape, exact=exact, asked=asked):
            assert min(shape) >= 1 and max(shape) <= 512
            asked.append(shape)
            return exact(shape)

        peak = PeakBytes(noted, replace(fakes().manifest, layout=layout))
        assert peak(lengths) >= exact(lengths)
        assert peak([*lengths, more]) >= peak(lengths)
        known = len(asked)
        peak(lengths)
        assert len(asked) == known
