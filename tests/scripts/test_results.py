"""What a benchmark leaves: raw samples beside a summary with their sha256, and tables that are records again."""

from __future__ import annotations

import hashlib
import json
import statistics

import pytest
from benchmark import results
from benchmark.results import (
    described,
    pairwise,
    percentiles,
    raw_path,
    read_json,
    read_summary,
    rounded,
    tabulated,
    thinned,
    untabulated,
    write_results,
)
from hypothesis import given, settings
from hypothesis import strategies as st

RAW = {"model": "tiny", "samples_s": [0.1234567891, 0.2, 0.4], "others": {"a": [1.0, 2.0]}}


def summarized(raw):
    return {"model": raw["model"], "seconds": described(raw["samples_s"])}


def test_a_summary_lies_beside_its_samples(tmp_path):
    path = tmp_path / "deep" / "tiny.json"
    summary = write_results(path, RAW, summarized)
    assert raw_path(path) == tmp_path / "deep" / "tiny.raw.json" and read_json(raw_path(path)) == RAW
    assert summary["raw_sha256"] == hashlib.sha256(raw_path(path).read_bytes()).hexdigest()
    assert read_summary(path) == summary and summary["seconds"]["median"] == 0.2
    assert not list(tmp_path.glob("**/*.part"))


def test_figures_keep_six_digits():
    assert rounded({"a": [0.123456789, (1e-9 / 3,)], "b": 1234567890, "c": "x", "d": True}) == {
        "a": [0.123457, [3.33333e-10]],
        "b": 1234567890,
        "c": "x",
        "d": True,
    }


def test_what_is_said_of_samples():
    assert described([3.0, 1.0, 2.0]) == {"count": 3, "median": 2.0, "quartiles": [1.5, 2.5]}
    assert pairwise([2.0, 20.0, 5.0], [1.0, 10.0, 2.0])["median"] == 2.0
    assert percentiles([]) == {"count": 0}
    found = percentiles([float(n) for n in range(101)])
    assert (found["count"], found["mean"], found["p50"], found["p99"]) == (101, 50.0, 50.0, 99.0)


def test_ratios_need_the_same_rounds():
    with pytest.raises(ValueError):
        pairwise([1.0, 2.0], [1.0])


def test_a_curve_keeps_its_ends():
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
    made = thinned(list(range(1000)), 100)
    assert len(made) == 100 and (made[0], made[-1]) == (0, 999) and made == sorted(made)


def test_a_list_of_records_is_a_table():
    records = [{"name": "a", "seconds": {"median": 1.0, "count": 3}}, {"name": "b", "why": "failed"}]
    table = tabulated(records)
    assert table == {
        "columns": ["name", "seconds.median", "seconds.count", "why"],
        "rows": [["a", 1.0, 3, None], ["b", None, None, "failed"]],
    }
    assert untabulated(table) == records


scalars = st.integers() | st.floats(0, 1) | st.text(max_size=3) | st.booleans()
flat = st.dictionaries(st.sampled_from("abcd"), scalars, max_size=4)
records = st.lists(st.dictionaries(st.sampled_from("xyz"), scalars | flat | st.lists(scalars, max_size=3)), max_size=4)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("pqr"), records | scalars))
def test_what_is_written_is_read(data):
    assert untabulated(tabulated(data)) == data
    assert json.loads(results._lines(data)) == data


def test_medians_are_those_of_the_samples(tmp_path):
    summary = write_results(tmp_path / "a.json", RAW, summarized)
    assert summary["seconds"] == rounded({**described(RAW["samples_s"])})
    assert summary["seconds"]["median"] == statistics.median(RAW["samples_s"])
