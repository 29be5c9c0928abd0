"""The page that sets searches beside one another, from a report that is made up."""

from __future__ import annotations

import pytest
from benchmark import searches

MACHINE = {"cpu": "a CPU", "threads": 2, "packages": {"apache-tvm": "0"}}


def measured(kernel, logs, search, *ratios):
    """A kernel whose speed is so much of the reference's in two buckets, of which the second counts three times."""
    seconds = {rows: [[ratio, 1.0]] * 3 for rows, ratio in zip(("16", "64"), ratios, strict=True)}
    seconds["8192"] = [[0.1, 1.0]]  # weighs nothing
    weights = {"16": 0.25, "64": 0.75, "8192": 0.0}
    return {"kernel": kernel, "logs": logs, "search": search, "seed": 1, "trials": 64} | {
        "weights": weights,
        "seconds": seconds,
    }


REPORT = {
    "machine": MACHINE,
    "command": "scripts/bench searches",
    "started": "now",
    "revision": "abc",
    "reference": "shipped",
    "kernels": [
        measured("a", "seed1", "xgb", 1.0, 1.0),
        measured("a", "random", "random", 1.0, 0.9),
        measured("b", "seed1", "xgb", 1.1, 1.0),
        measured("b", "random", "random", 0.8, 0.8),
    ],
    "curves": [
        {"logs": "seed1", "kernel": "a", "search": "xgb", "best": [1.0, 1.1]},
        {"logs": "random", "kernel": "a", "search": "random", "best": [1.0]},
    ],
}


def test_speed_is_the_weighted_geometric_mean():
    assert searches.speed(REPORT["kernels"][1]) == pytest.approx(0.9**0.75)
    assert searches.speed(REPORT["kernels"][3]) == pytest.approx(0.8)


def test_the_page():
    text = searches.markdown(searches.summarized(REPORT))
    assert "| kernel | seed1: xgb, seed 1, 64 trials | random: random, seed 1, 64 trials |" in text
    assert "| `a` | 1.000 | 0.924 |" in text and "| `b` | 1.024 | 0.800 |" in text
    assert f"**{1.1**0.125:.3f}**" in text and "| least | 1.000 | 0.800 |" in text


def test_the_picture(tmp_path):
    searches.draw(searches.summarized(REPORT), tmp_path / "searches.png")
    assert (tmp_path / "searches.png").stat().st_size > 1000
