"""scripts/bench serving and scheduler: a tiny model from saturation to Markdown, and the figures drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmark import __main__ as command_line
from benchmark import models, scheduling, serving, serving_report
from benchmark.padded_model import Padded
from rich.console import Console

from turbo_tvm.runtime.scheduling.scheduler import POLICIES


def settings(tmp_path, **changes) -> serving.Settings:
    asked = {
        "command": "scripts/bench serving",
        "models": {"tiny": {}},
        "precisions": ("fp32",),
        "ranges": ("2..30",),
        "layouts": ("packed", "padded"),
        "policies": ("nobatch", "dp"),
        "fractions": (0.3, 0.5),
        "seconds": 0.05,
        "longest": 0.2,
        "threads": 1,
        "seed": 0,
        "out": tmp_path,
        "resume": False,
    }
    return serving.Settings(**(asked | changes))


@pytest.fixture
def small(monkeypatch, served):
    """A tiny model, few requests, and no five seconds of measuring."""
    compiled = served("bert").compiled
    monkeypatch.setattr(serving, "RANGES", {"2..30": (2, 30), "1..9": (1, 9)})
    monkeypatch.setattr(serving, "SATURATION_S", 0.01)
    monkeypatch.setattr(serving, "SATURATION_ROUNDS", 2)
    monkeypatch.setattr(serving, "LEAST_REQUESTS", 20)
    monkeypatch.setattr(serving, "IDLE_REQUESTS", 20)
    monkeypatch.setattr(serving, "IDLE_PAUSE_S", 0.0)
    monkeypatch.setattr(serving, "_compile", lambda *_: compiled)
    measure = type(compiled).measure_cost  # which a padded model inherits
    monkeypatch.setattr(type(compiled), "measure_cost", lambda self: measure(self, budget_s=0.1))
    before = compiled._artifact
    yield compiled
    compiled._artifact = before


@pytest.mark.slow
def test_a_tiny_model_from_saturation_to_markdown(tmp_path, small):
    pytest.importorskip("matplotlib")
    serving.run(settings(tmp_path), Console(quiet=True))
    report = json.loads((tmp_path / "serving.raw.json").read_text())
    assert list(report["loads"]) == ["tiny fp32 2..30 packed", "tiny fp32 2..30 padded"]
    for load in report["loads"].values():
        assert set(load["saturation"]) == set(load["trials"]) == {"nobatch", "dp"}
        assert all(len(rates) == serving.SATURATION_ROUNDS for rates in load["saturation"].values())
        for trials in load["trials"].values():
            assert [t["fraction"] for t in trials] == [0.3, 0.5]
            for t in trials:
                assert len(t["latency_s"]) == t["requests"] and min(t["latency_s"]) > 0
                assert sum(t["batch_tokens"]) > 0 and t["simulated_mean_s"] > 0
    assert len(report["idle"]["tiny fp32"]) == 19 and min(report["idle"]["tiny fp32"]) > 0
    text = (tmp_path / "serving.md").read_text()
    for words in ("| tiny fp32 2..30 packed | dp |", "## tiny fp32 2..30 padded", "Idle engine", "1.00x"):
        assert words in text
    assert (tmp_path / "serving.png").stat().st_size > 1000
    (tmp_path / "serving.md").unlink()
    assert command_line.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "serving.md").read_text() == text
    serving.run(settings(tmp_path, resume=True), Console(quiet=True))
    assert json.loads((tmp_path / "serving.raw.json").read_text()) == report  # all of it is kept
    serving.run(settings(tmp_path, resume=True, ranges=("1..9",), layouts=("packed",)), Console(quiet=True))
    again = json.loads((tmp_path / "serving.raw.json").read_text())
    assert again["loads"].items() > report["loads"].items() and len(again["runs"]) == 2


def test_padded_means_that_every_sequence_is_as_long_as_the_longest(served):
    compiled = served("bert").compiled
    padded = Padded.of(compiled)
    asked = []
    run = compiled._executor.run
    padded._executor = type("Noted", (), {"threads": 1, "memory": ("compact", None)})()
    padded._executor.run = lambda batch, output: asked.append(batch.lengths.tolist()) or run(batch, output)
    answers = padded.answer([padded.prepare(np.arange(n)) for n in (3, 9, 5)], "last_hidden_state")
    assert asked == [[9, 9, 9]] and [len(a) for a in answers] == [3, 9, 5]
    assert padded.manifest.layout == "padded" and compiled.manifest.layout == "packed"


def trial(rate, bounded):
    return {"rate": rate, "bounded": bounded}


def test_the_critical_rate_lies_between():
    assert serving_report.critical([trial(2.0, False), trial(1.0, True)]) == (1.0, 2.0)
    assert serving_report.critical([trial(1.0, True)]) == (1.0, None)
    assert serving_report.critical([trial(1.0, False)]) == (0.0, 1.0)
    chance = [trial(1.0, False), trial(2.0, True), trial(3.0, False), trial(4.0, False)]
    assert serving_report.critical(chance) == (2.0, 3.0)


def test_the_command_line():
    argv = [
        "serving",
        "--models",
        "minilm-l6",
        "--lengths",
        "5..500",
        "--policies",
        "dp",
        "--fractions",
        "0.5",
        "--out",
        "there",
    ]
    found = command_line.serving_settings(command_line.arguments(argv), argv)
    assert found.command == "scripts/bench " + " ".join(argv)
    assert (found.models, found.ranges, found.out) == (
        {"minilm-l6": models.MODELS["minilm-l6"]},
        ("5..500",),
        Path("there"),
    )
    assert found.fractions == (0.5,)
    assert [(load.layout, load.policies) for load in serving.plan(found)] == [
        *[("packed", ("dp",)), ("padded", ("dp",))] * len(found.precisions)
    ]
    every = command_line.serving_settings(command_line.arguments(["serving"]), ["serving"])
    assert set(every.policies) == set(POLICIES)


def test_what_scheduling_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduling, "WAITING", (1, 10))
    monkeypatch.setattr(scheduling, "COLUMNS", ("policy", "1", "10"))
    monkeypatch.setattr(scheduling, "ROUNDS", 2)
    scheduling.run("scripts/bench scheduler", 0, 2000, tmp_path, Console(quiet=True))
    report = json.loads((tmp_path / "scheduling.raw.json").read_text())
    assert len(report["planning_s"]["dp"]["10"]) == 2 and report["simulated"]["dp"]["seconds"] > 0
    assert "Simulating 2,000 requests over 64 replicas" in (tmp_path / "scheduling.md").read_text()
