"""Streams of requests: their rates, their lengths, and files that hold them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling.arrivals import Trace, bursty, poisson, read_trace, uniform


@pytest.mark.parametrize("make", [poisson, bursty])
def test_rate_and_lengths(make):
    make = partial(make, burst_s=0.1) if make is bursty else make
    trace = make(50.0, 40_000, uniform(2, 100), seed=1)
    assert trace.rate == pytest.approx(50.0, rel=0.12)
    assert (trace.lengths.min(), trace.lengths.max()) == (2, 100)
    assert (np.diff(trace.arrival_s) >= 0).all()
    np.testing.assert_array_equal(trace.arrival_s, make(50.0, 40_000, uniform(2, 100), seed=1).arrival_s)


def test_gaps_of_a_poisson_stream_are_exponential():
    gaps = np.diff(poisson(10.0, 50_000, uniform(1, 1)).arrival_s)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


def test_bursts_are_dense_and_silences_long():
    trace = bursty(10.0, 20_000, uniform(1, 1), peak=5.0, burst_s=2.0)
    gaps = np.diff(trace.arrival_s)
    assert np.median(gaps) < 1 / 30  # within a burst: 50 per second
    assert gaps.max() > 4.0 and gaps.std() > 3 * gaps.mean()


def test_the_same_requests_at_another_rate():
    trace = poisson(10.0, 100, uniform(1, 9)).at_rate(40.0)
    assert trace.rate == pytest.approx(40.0) and trace.arrival_s[0] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: uniform(0, 3),
        lambda: uniform(5, 3),
        lambda: poisson(0.0, 3, uniform(1, 2)),
        lambda: poisson(float("nan"), 3, uniform(1, 2)),
        lambda: bursty(1.0, 3, uniform(1, 2), peak=1.0),
        lambda: Trace(np.array([1.0, 0.5]), np.array([1, 1])),
        lambda: Trace(np.array([1.0]), np.array([1, 1])),
        lambda: Trace(np.array([1.0, np.inf]), np.array([1, 1])),
        lambda: Trace(np.array([1.0]), np.array([0])),
        lambda: Trace(np.array([]), np.array([], np.int64)),
        lambda: Trace(np.array([1.0, 1.0]), np.array([1, 1])).at_rate(5.0),
    ],
)
def test_what_is_no_stream(wrong):
    with pytest.raises(InputError):
        wrong()


def test_a_trace_from_a_file(tmp_path):
    path = tmp_path / "trace.csv"
    for encoding in ("utf-8", "utf-8-sig"):  # as spreadsheets write it
        path.write_text("arrival_s,user,length\n2.5,ann,7\n1,bob,3\n", encoding=encoding)
        trace = read_trace(path)
    assert trace.arrival_s.tolist() == [1.0, 2.5] and trace.lengths.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name the columns"),
        ("time,length\n1,2\n", "must name the columns"),
        ("arrival_s,length\n", "no requests"),
        ("arrival_s,length\n1,2\nx,3\n", "line 3"),
        ("arrival_s,length\n1,0\n", "line 2"),
        ("arrival_s,length\nnan,4\n", "line 2"),
        ("arrival_s,length\n1\n", "line 2"),
    ],
)
def test_a_file_that_is_wrong_is_told_where(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(path)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00arrival_s,length")
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "binary")
