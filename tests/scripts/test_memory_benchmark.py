"""scripts/bench memory: its traces, what it counts, and a tiny model from planning to Markdown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark import __main__ as command_line
from benchmark import memory, memory_child, memory_report, models, traces
from rich.console import Console

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def test_traces_are_what_they_are_called():
    made = traces.traces(0)
    assert all(len(lengths) == 1000 for lengths in made.values())
    assert all(1 <= n <= 500 for lengths in made.values() for n in lengths)
    assert (min(made["uniform"]), max(made["uniform"])) == (5, 500)
    assert sorted(made["long-tailed"])[500] in range(18, 23) and max(made["long-tailed"]) > 200
    assert all(b - a > 300 for a, b in zip(made["alternating"][::2], made["alternating"][1::2], strict=True))
    assert list(made["growing"]) == sorted(made["growing"])
    assert traces.traces(0) == made != traces.traces(1)


def test_the_command_line():
    args = command_line.arguments(["memory", "--measured", "0", "--out", "there"])
    found = command_line.memory_settings(args, ["memory", "--measured", "0", "--out", "there"])
    assert found.command == "scripts/bench memory --measured 0 --out there"
    assert (found.model, found.sizes, found.measured, found.out) == (
        "bert-base",
        models.MODELS["bert-base"],
        0,
        Path("there"),
    )


def test_every_strategy_is_counted(served):
    found = memory.planned_trace(served("bert").compiled.manifest, (3, 60, 3, 60), Console(quiet=True), "a trace")
    assert set(found) == {"compact", "turbo2021", "pooled", "static"}
    for counted in found.values():
        assert len(counted["held"]) == 4 and counted["peak_held"] == max(counted["held"]) > 0
        assert counted["worst_ratio"] >= counted["mean_ratio"] >= 1
        did = counted["statistics"]
        assert counted["bytes_per_request"] == (did["bytes_allocated"] + did["bytes_freed"]) / 4
    assert found["compact"]["worst_ratio"] == 1.0
    assert found["static"]["allocations"] == 1
    assert found["pooled"]["statistics"]["bytes_freed"] == 0


def test_an_engine_that_fails_is_absent_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(memory.__file__).resolve().parents[1]))
    found = memory.measured_trace("turbo_tvm", [3], tmp_path, 1)
    assert "model.turbo" in found["absent"]
    summary = memory_report.summarized_growth({"uniform": {"turbo_tvm": found}})
    assert "absent: " in memory_report.measured_rows("uniform", summary["uniform"])[0][2]


def test_resident_memory_is_read():
    memory_child.reset_most()
    before = memory_child.resident()
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    assert memory_child.resident() - before > 32 << 20
    assert memory_child.most_resident() >= memory_child.resident() - (1 << 20)


@pytest.mark.slow
def test_a_tiny_model_from_planning_to_markdown(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", str(Path(memory.__file__).resolve().parents[1]))
    monkeypatch.setattr(memory, "traces", lambda seed: {"uniform": (5, 9, 5), "growing": (1, 2, 3, 4)})
    monkeypatch.setattr(memory, "ENGINES", ("turbo_tvm", "PyTorch"))
    monkeypatch.setattr(memory, "DEEP", TINY | {"num_hidden_layers": 3})
    monkeypatch.setattr(memory.OnnxFiles, "exported", lambda self, attention: "")
    settings = memory.Settings("scripts/bench memory", "tiny", TINY, 2, 1, 0, tmp_path)
    memory.run(settings, Console(quiet=True))
    report = json.loads((tmp_path / "memory.raw.json").read_text())
    assert set(report["planned"]) == set(report["measured"]) == {"uniform", "growing"}
    for by_engine in report["measured"].values():
        for found in by_engine.values():
            assert len(found["resident"]) == 2 and found["most"] >= found["after_first"] > 0
    text = (tmp_path / "memory.md").read_text()
    for part in ("## Planned", "## Measured", "| uniform | compact |", "| growing | PyTorch |"):
        assert part in text
    assert (tmp_path / "memory.png").stat().st_size > 1000
