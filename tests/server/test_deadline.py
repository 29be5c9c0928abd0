"""Deadlines, on a clock of their own."""

from __future__ import annotations

import pytest

from turbo_tvm.server import deadline
from turbo_tvm.server.deadline import Deadline


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
    return now


def test_what_remains(clock):
    one = Deadline(2.0, started_s=100.0)
    assert one.remaining_s == 2.0 and not one.passed
    clock[0] = 101.5
    assert one.remaining_s == 0.5 and not one.passed
    clock[0] = 102.5
    assert one.remaining_s == 1e-6 and one.passed
