"""Two artifacts in turn: what is measured, what the page says, and which pairs are refused."""

from __future__ import annotations

import json
from itertools import groupby
from types import SimpleNamespace

import pytest
from benchmark.__main__ import main

import turbo_tvm


class Model:
    """Runs nothing, and says so to a list."""

    def __init__(self, name, calls, **others):
        self.manifest = SimpleNamespace(
            **{"name": "toy", "precision": "fp32", "inputs": ("ids",), "outputs": ("o",)} | others,
            request_limits=SimpleNamespace(vocab_size=9),
        )
        self._name, self._calls = name, calls

    def run(self, sequences):
        self._calls.append((self._name, [len(one) for one in sequences]))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`bench(old, new, *options)`: the status and the output directory."""

    def bench(old, new, *options):
        known = {"old.turbo": old, "new.turbo": new}
        monkeypatch.setattr(turbo_tvm, "load", lambda path, threads: known[path.name])
        return main(["artifacts", *known, "--seconds", "0", "--threads", "1", "--out", str(tmp_path), *options])

    return bench


def test_both_run_equally_often_and_take_turns(bench, tmp_path):
    calls: list = []
    assert bench(Model("a", calls), Model("b", calls), "--only", "8x16", "--names", "then", "now") == 0
    assert all(lengths == [16] * 8 for _, lengths in calls)
    report = json.loads((tmp_path / "artifacts.raw.json").read_text())
    (found,) = report["workloads"]
    then, now = found["samples_s"]["then"], found["samples_s"]["now"]
    assert len(then) == len(now) >= 5
    assert len([name for name, _ in groupby(name for name, _ in calls)]) > 5, "one after the other, round by round"
    text = (tmp_path / "artifacts.md").read_text()
    assert "toy fp32" in text and "geometric mean" in text and "| requests | then | now | gain |" in text


def test_a_set_without_the_grid_has_no_mean(bench, tmp_path):
    assert bench(Model("a", []), Model("b", []), "--only", "long-tailed") == 0
    text = (tmp_path / "artifacts.md").read_text()
    assert "geometric mean" not in text and "long-tailed" in text


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_other_models_are_refused(bench, what):
    with pytest.raises(SystemExit, match=f"differ in their {what}"):
        bench(Model("a", []), Model("b", [], **{what: ("other",)}))
