"""Statistics: buckets, percentiles, counts."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_tvm.runtime.scheduling.engine_statistics import COUNT_BOUNDS, TIME_BOUNDS_S, Histogram, Recorder


def test_bounds_grow():
    for bounds in (TIME_BOUNDS_S, COUNT_BOUNDS):
        assert list(bounds) == sorted(set(bounds))
    assert COUNT_BOUNDS[:5] == (1, 2, 3, 4, 5) and TIME_BOUNDS_S[-1] > 60


def test_percentiles_are_close_from_above():
    values = np.random.default_rng(0).lognormal(-4, 1, 5000)
    histogram = Histogram(TIME_BOUNDS_S)
    for value in values:
        histogram.add(float(value))
    found = histogram.snapshot()
    assert found.count == 5000 and found.mean == pytest.approx(values.mean())
    for percent in (1, 50, 95, 99, 100):
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert exact <= found.percentile(percent) <= 1.19 * exact


def test_a_value_on_a_bound_is_within_it():
    histogram = Histogram((1, 2, 4))
    for value in (1, 2, 2, 3, 4, 5):
        histogram.add(value)
    assert histogram.snapshot().counts == (1, 2, 2, 1)
    assert histogram.snapshot().percentile(100) == 5


def test_an_empty_histogram():
    found = Histogram((1.0,)).snapshot()
    assert (found.count, found.mean, found.percentile(99)) == (0, 0.0, 0.0)


def test_a_snapshot_does_not_change():
    recorder = Recorder()
    recorder.count("submitted", 3)
    recorder.count("answered")
    recorder.add("latency_s", 0.5)
    before = recorder.snapshot()
    recorder.count("cancelled")
    recorder.count("rows", 20)
    recorder.count("padding_rows", 5)
    after = recorder.snapshot()
    assert (before.pending, before.latency_s.count, before.padding_waste) == (2, 1, 0.0)
    assert (after.pending, after.cancelled, after.padding_waste) == (1, 1, 0.25)
    assert "3 requests: 1 answered" in str(after) and "25.0% padding" in str(after)
