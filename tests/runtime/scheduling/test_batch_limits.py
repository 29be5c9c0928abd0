"""Limits on a batch: what may run together, who has waited too long, and limits that are none."""

from __future__ import annotations

import pytest

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request


def test_each_limit_binds_and_one_by_itself_is_always_allowed():
    for limits in (
        BatchLimits(max_batch=2),
        BatchLimits(max_tokens=25),
        BatchLimits(max_bytes=250, peak_bytes=lambda lengths: 10 * sum(lengths)),
    ):
        assert limits.allow([10, 10]) and not limits.allow([10, 10, 10])
        assert limits.allow([1000])
    assert BatchLimits().allow([1000] * 1000)


def test_a_request_is_overdue_once_it_has_waited_so_long():
    limits = BatchLimits(max_wait_s=2.0)
    early, late = Request(0, 1, arrival_s=1.0), Request(1, 1, arrival_s=2.5)
    assert [limits.at(3.0).overdue(one) for one in (early, late)] == [True, False]
    assert not BatchLimits().at(1e9).overdue(early)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch is at least 1"),
        ({"max_tokens": -1}, "max_tokens is at least 1"),
        ({"max_wait_s": -1.0}, "max_wait_s is a number of seconds from 0"),
        ({"max_wait_s": float("nan")}, "max_wait_s is a number of seconds from 0"),
        ({"max_bytes": 5}, "max_bytes needs peak_bytes"),
    ],
)
def test_limits_that_are_none(options, message):
    with pytest.raises(InputError, match=message):
        BatchLimits(**options)
