"""scripts/bench: its arithmetic on made-up samples, and a tiny model through PyTorch and ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark import __main__ as command_line
from benchmark import (
    contenders,
    encoder,
    figures,
    machine,
    models,
    overhead,
    plots,
    render,
    report,
    strategies,
    workloads,
)
from benchmark.contenders import OURS
from benchmark.encoder_results import Results, read_raw
from benchmark.measure import Entry, Limits, measure, more_rounds, rotated, rule_out
from benchmark.results import raw_path, read_summary
from benchmark.strategies import ONE_BY_ONE, PADDED, RAGGED_INPUT
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "cpu": "a CPU",
    "cpu_features": ["avx2"],
    "logical_cpus": 2,
    "memory_gib": 8,
    "threads": 2,
    "system": "Linux",
    "python": "3",
    "packages": {"torch": "2", "openvino": "absent"},
    "sources": "abc",
}
HEADER = {"model": "tiny", "precision": "fp32", "seed": 0, "sizes": {}, "machine": MACHINE}
RUN = {"command": "scripts/bench --only 1x8", "started": "now", "revision": "abc"}


class FakeClock:
    """Time passes only in calls and pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self, seconds: float, log: list[str] | None = None, name: str = "") -> Any:
        def run() -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return run


def record(contender: str, *samples: float, strategy: str = PADDED, first: float | None = None) -> dict[str, Any]:
    first_s = samples[0] if first is None else first
    return {"contender": contender, "strategy": strategy, "first_s": first_s, "samples_s": list(samples)}


def workload(name: str, *entries: dict[str, Any], lengths: tuple[int, ...] = (8,), kind: str = "grid") -> dict:
    return {
        "name": name,
        "label": name.replace("x", " x "),
        "kind": kind,
        "lengths": list(lengths),
        "tokens": sum(lengths),
        "flops": 1e9,
        "rounds": 3,
        "load_average": [0.1, 0.1, 0.1],
        "cpus_used_by_others": 0.0,
        "entries": list(entries),
    }


def summary() -> dict[str, Any]:
    return {"page": "encoder", **figures.summarized(whole_result())}


def mine(*samples: float) -> dict[str, Any]:
    return record(OURS, *samples, strategy=RAGGED_INPUT)


def whole_result() -> dict[str, Any]:
    grid = [
        workload("1x8", mine(1.0, 1.0, 1.0), record("PyTorch", 4.0, 4.0, 4.0), record("OpenVINO", 2.0, 2.0, 2.0)),
        workload("8x16", mine(1.0, 1.0, 1.0), record("PyTorch", 8.0, 8.0, 8.0), lengths=(16,) * 8),
    ]
    ragged = workload(
        "ragged-uniform-2-100",
        mine(0.001, 0.002, 0.001),
        record("PyTorch", 0.004, 0.004, 0.004),
        record("PyTorch", first=0.009, strategy=ONE_BY_ONE) | {"not_repeated": "one sample, 2.2x slower than padded"},
        {"contender": "OpenVINO", "strategy": PADDED, "failed": "out of memory"},
        lengths=(2, 100),
        kind="ragged",
    )
    check = {"max_abs_diff": 1e-6, "cosine": 1.0}
    return {
        "format": 1,
        **HEADER,
        "runs": [RUN],
        "contenders": {"PyTorch": {"build_s": 1.0, "check": check, "weights": "float32"}},
        "absent": {"ONNX Runtime": "not installed: No module named 'onnxruntime'"},
        "workloads": [*grid, ragged],
    }


def test_ratios_are_taken_round_by_round() -> None:
    # the second round was slow for everyone: the ratio of medians would be 2.5
    assert figures.ratio(record("PyTorch", 2.0, 20.0, 5.0), mine(1.0, 10.0, 2.0))["median"] == 2.0
    assert figures.ratio(record("PyTorch", first=6.0), mine(1.0, 1.0) | {"first_s": 2.0})["median"] == 3.0


def test_geometric_mean_and_least_over_the_grid() -> None:
    mean = figures.grid_mean(summary())
    assert mean is not None and mean.mean == pytest.approx(4.0)  # of 2 and 8
    assert (mean.least, mean.point, mean.points) == (2.0, "1 x 8", 2)
    each = figures.grid_mean(summary(), "PyTorch")
    assert each is not None and each.mean == pytest.approx(math.sqrt(32))


def test_best_rival_is_the_least_median() -> None:
    raw = workload(
        "ragged",
        mine(1.0, 1.0, 1.0),
        record("PyTorch", 9.0, 1.0, 9.0),
        record("PyTorch", 3.0, 3.0, 3.0, strategy=ONE_BY_ONE),
        record("OpenVINO", 5.0, 5.0, 5.0),
    )
    made = figures.summarized_workload(raw)
    padded, best = figures.best_rival(made, strategy=PADDED), figures.best_rival(made)
    assert padded is not None and (padded.contender, padded.ratio) == ("OpenVINO", 5.0)
    assert best is not None and (best.contender, best.strategy, best.ratio) == ("PyTorch", ONE_BY_ONE, 3.0)
    assert figures.best_rival(made, "ONNX Runtime") is None


def test_without_ours_there_are_no_ratios() -> None:
    made = figures.summarized_workload(workload("1x8", record("PyTorch", 2.0)))
    best = figures.best_rival(made)
    assert best is not None and best.ratio is None and best.seconds == 2.0
    assert figures.grid_mean({"workloads": [made]}) is None


def test_rotation_gives_everyone_every_place() -> None:
    names = ["a", "b", "c", "d"]
    orders = [rotated(names, number) for number in range(4)]
    assert all(sorted(order) == names for order in orders)
    assert all(sorted(order[place] for order in orders) == names for place in range(4))
    assert rotated([], 3) == []


def test_rounds_stop_at_the_budget_but_not_before_the_least() -> None:
    limits = Limits(rounds=7, min_rounds=3, seconds=10.0)
    assert more_rounds(2, 100.0, limits)
    assert not more_rounds(3, 100.0, limits)
    assert more_rounds(6, 9.0, limits)
    assert not more_rounds(7, 0.0, limits)


@pytest.mark.parametrize(("call_s", "rounds", "calls"), [(0.001, 7, 10), (0.1, 7, 1), (4.0, 3, 1)])
def test_samples_adapt_to_the_length_of_a_call(call_s: float, rounds: int, calls: int) -> None:
    clock = FakeClock()
    entries = [Entry(OURS, RAGGED_INPUT, clock.call(call_s)), Entry("PyTorch", PADDED, clock.call(2 * call_s))]
    assert measure(entries, Limits(seconds=20.0), str, clock) == rounds
    assert entries[0].samples_s == pytest.approx([call_s] * rounds)
    assert entries[0].calls_per_sample == calls


def test_only_short_calls_are_warmed() -> None:
    for call_s, calls in ((0.4, 2 + 2 * 3), (0.6, 2 + 3), (3.0, 1 + 3)):
        clock, log = FakeClock(), list[str]()
        measure([Entry(OURS, RAGGED_INPUT, clock.call(call_s, log))], Limits(rounds=3), str, clock)
        assert len(log) == calls


def test_rounds_rotate_and_leave_out_what_is_far_behind() -> None:
    clock, log = FakeClock(), list[str]()
    times = {OURS: 3.0, "OpenVINO": 3.0, "PyTorch": 9.0}
    entries = [Entry(n, RAGGED_INPUT if n == OURS else PADDED, clock.call(s, log, n)) for n, s in times.items()]
    assert measure(entries, Limits(rounds=2, min_rounds=2), str, clock) == 2
    assert log[3:] == [OURS, "OpenVINO", "OpenVINO", OURS]
    assert entries[2].record()["not_repeated"] == "one sample, 3.0x slower than OpenVINO (padded)"
    assert entries[2].record()["samples_s"] == []


def test_a_slow_strategy_is_measured_once_but_the_best_padding_always_again() -> None:
    def made(contender: str, strategy: str, first: float) -> Entry:
        return Entry(contender, strategy, lambda: None, first_s=first)

    entries = [
        made("OpenVINO", PADDED, 5.0),
        made("OpenVINO", ONE_BY_ONE, 2.0),
        made("ONNX Runtime", PADDED, 6.0),
        made("PyTorch", PADDED, 9.0),
        made("PyTorch", ONE_BY_ONE, 4.4),
        made(OURS, RAGGED_INPUT, 100.0),
    ]
    rule_out(entries)
    assert [e.not_repeated is None for e in entries] == [True, True, True, False, True, True]
    assert entries[3].not_repeated == "one sample, 2.0x slower than one by one"


def test_a_call_that_compiles_is_not_the_first_measurement() -> None:
    clock, compiled = FakeClock(), [0]

    def call() -> None:
        clock.now += 0.2 if compiled[0] else 30.0
        compiled[0] = 1

    entry = Entry("torch.compile", PADDED, call, lambda: compiled[0])
    measure([entry], Limits(rounds=1, min_rounds=1), str, clock)
    assert entry.first_s == pytest.approx(0.2)


def test_a_failure_is_recorded_and_the_others_go_on() -> None:
    def fails() -> None:
        raise MemoryError("too much")

    clock = FakeClock()
    entries = [Entry("PyTorch", PADDED, fails), Entry(OURS, RAGGED_INPUT, clock.call(1.0))]
    measure(entries, Limits(), contenders.reason, clock)
    assert entries[0].record() == {"contender": "PyTorch", "strategy": PADDED, "failed": "MemoryError: too much"}
    assert len(entries[1].samples_s) == 7


def test_workloads_are_the_grid_and_three_ragged_sets() -> None:
    everything = workloads.all_workloads(0)
    assert [w.name for w in everything[:7]] == [f"1x{n}" for n in (8, 16, 32, 64, 128, 256, 512)]
    assert len(everything) == 24 and everything == workloads.all_workloads(0)
    ragged = {w.name: w.lengths for w in everything if w.kind == workloads.RAGGED}
    assert all(len(lengths) == 32 for lengths in ragged.values())
    assert min(ragged["ragged-long-tailed"]) >= 2 and max(ragged["ragged-long-tailed"]) <= 512
    assert 10 <= np.median(ragged["ragged-long-tailed"]) <= 40
    assert [w.name for w in workloads.select(everything, "32x", quick=False)] == [f"32x{n}" for n in workloads.LENGTHS]
    assert [w.name for w in workloads.select(everything, None, quick=True)] == list(workloads.QUICK)


def test_strategies_answer_every_request_once() -> None:
    sequences = [np.arange(1, n + 1) for n in (5, 2, 9, 3, 7, 1, 4, 8, 6)]
    for strategy in strategies.STRATEGIES:
        made = strategies.rectangles(strategy, sequences)
        assert sorted(i for r in made for i in r.rows) == list(range(9))
        for r in made:
            assert r.ids.shape[1] == max(len(sequences[i]) for i in r.rows)
            assert r.mask.sum(axis=1).tolist() == [len(sequences[i]) for i in r.rows]
    padded = [r.mask.size for r in strategies.rectangles("sorted, groups of 4", sequences)]
    assert padded == [16, 32, 9]


def test_wrong_answers_are_a_fault() -> None:
    right = [np.array([[1.0, 2.0]], np.float32)]
    near, far = [right[0] + np.float32(0.02)], [-right[0]]
    assert contenders.fault(contenders.compare(right, right), "fp32") is None
    assert "differ from PyTorch's by up to 0.02" in str(contenders.fault(contenders.compare(near, right), "fp32"))
    assert contenders.fault(contenders.compare(near, right), "bf16") is None
    assert "cosine -1.0000" in str(contenders.fault(contenders.compare(far, right), "bf16"))
    assert contenders.fault(contenders.compare([right[0] * np.nan], right), "fp32")


def test_results_are_kept_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "tiny-fp32.json"
    first = Results(path, HEADER, RUN)
    first.contenders({"PyTorch": {}}, {"OpenVINO": "not installed"})
    first.add(workload("1x16", record("PyTorch", 1.0)))
    first.add(workload("1x8", record("PyTorch", 1.0)))
    assert not list(tmp_path.glob("*.part"))

    again = Results(path, HEADER, RUN | {"started": "later"})
    assert again.has("1x8") and again.has("1x16") and not again.has("1x32")
    again.contenders({"OpenVINO": {}}, {"PyTorch": "not asked for"})
    again.add(workload("1x8", record("PyTorch", 3.0)))
    kept = read_raw(path)
    assert kept is not None and [w["name"] for w in kept["workloads"]] == ["1x8", "1x16"]
    assert kept["workloads"][0]["entries"][0]["samples_s"] == [3.0]
    assert [r["started"] for r in kept["runs"]] == ["now", "later"]
    assert kept["absent"] == {} and set(kept["contenders"]) == {"PyTorch", "OpenVINO"}


def test_results_of_other_versions_are_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "tiny-fp32.json"
    Results(path, HEADER, RUN).add(workload("1x8", record("PyTorch", 1.0)))
    other = Results(path, HEADER | {"machine": MACHINE | {"sources": "def"}}, RUN)
    assert not other.has("1x8") and other.differences == ["machine (sources)"]
    raw_path(path).write_text("{}")
    assert not Results(path, HEADER, RUN).has("1x8")


def test_markdown_names_the_figures_and_the_absent() -> None:
    text = report.markdown(summary(), "tiny-fp32")
    assert "    scripts/bench --only 1x8    # now, revision abc" in text
    assert "- ONNX Runtime is absent: not installed: No module named 'onnxruntime'" in text
    assert "- OpenVINO, padded, failed on ragged-uniform-2-100: out of memory" in text
    assert "| **best rival of each point** | 4.00x | 2.00x | 1 x 8 | 2 |" in text
    assert "| 1 x 8 | **1,000 ms** | 1 | OpenVINO: 2,000 ms (2.00x) | 4.00x | 2.00x |" in text
    assert "| PyTorch | 4 ms (4.00x) | 9 ms (9.00x †) | – | – |" in text
    assert "measure these again" not in text


def test_a_disturbed_workload_is_named() -> None:
    result = summary()
    result["workloads"][0]["cpus_used_by_others"] = 1.0
    assert "Other processes were running before 1 x 8: measure these again" in report.markdown(result, "tiny-fp32")


def test_report_renders_from_json_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny-fp32.json").write_text(json.dumps(summary()))
    (tmp_path / "other.json").write_text('{"model": "of another format"}')
    with open(tmp_path / "log", "w") as log:
        assert render.render_directory(tmp_path, Console(file=log, width=200)) == 1
    written = (tmp_path / "log").read_text()
    assert "other.json: no results of a benchmark; left alone" in written
    assert "geometric mean 4.00, least 2.00 at 1 x 8" in written
    assert (tmp_path / "tiny-fp32.md").exists()
    assert (tmp_path / "tiny-fp32.png").exists() or plots.HINT in written


def test_without_matplotlib_the_plot_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotsAbsent, match="matplotlib is not installed"):
        plots.draw(summary(), tmp_path / "x.png", "tiny")


def test_encoder_is_the_default_command() -> None:
    argv = ["--quick", "--only", "1x16"]
    asked = command_line.settings(command_line.arguments(argv), argv)
    assert asked.command == "scripts/bench --quick --only 1x16"
    assert list(asked.models) == ["minilm-l6"] and asked.precisions == ("fp32", "bf16")
    assert asked.limits == Limits(rounds=3, min_rounds=3, seconds=5.0)
    assert command_line.arguments(["report", "there"]).directory == Path("there")
    assert command_line.settings(command_line.arguments(["--rounds", "2"]), []).limits.min_rounds == 2


def test_report_of_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    asked = [sys.executable, "-m", "benchmark", "report", str(tmp_path)]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "error: there are no results in" in done.stderr


def test_the_digest_follows_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "turbo_tvm" / "passes" / "a.py"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    before = machine.sources(tmp_path)
    source.write_text("2")
    assert machine.sources(tmp_path) != before
    assert 0.0 <= machine.cpus_used_by_others(0.02) <= (os.cpu_count() or 1)


def test_a_tiny_model_from_building_to_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "VOCABULARY", 101)
    monkeypatch.setattr(contenders, "VOCABULARY", 101)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    settings = encoder.Settings(
        command="scripts/bench",
        models={"tiny": sizes},
        precisions=("fp32",),
        threads=1,
        seed=0,
        out=tmp_path,
        limits=Limits(rounds=2, min_rounds=2),
        quick=True,
        rivals=("PyTorch", "OpenVINO"),
    )
    encoder.run(settings, Console(quiet=True))
    result, raw = read_summary(tmp_path / "tiny-fp32.json"), read_raw(tmp_path / "tiny-fp32.json")
    assert result is not None and raw is not None and [w["name"] for w in result["workloads"]] == list(workloads.QUICK)
    assert result["absent"]["OpenVINO"].startswith("not installed: ")
    assert result["absent"]["torch.compile"] == "not asked for"
    assert set(result["contenders"]) == {OURS, "PyTorch"}
    for made in result["workloads"]:
        assert figures.ours(made) is not None and figures.best_rival(made) is not None
    for kept in raw["workloads"]:
        rate = figures.gflops(figures.summarized_workload(kept))
        assert kept["fraction_of_peak"] == pytest.approx(rate * 1e9 / raw["limits"]["fp32_flops"])
        assert all(len(e["samples_s"]) == 2 or e["not_repeated"] for e in kept["entries"])
    assert "OpenVINO is absent: not installed" in (tmp_path / "tiny-fp32.md").read_text()

    resumed = encoder.Settings(**{**vars(settings), "resume": True, "command": "scripts/bench --resume"})
    encoder.run(resumed, Console(quiet=True))
    assert read_summary(tmp_path / "tiny-fp32.json") == result and read_raw(tmp_path / "tiny-fp32.json") == raw


def test_overhead_of_a_toy_model(served, monkeypatch):
    monkeypatch.setattr(overhead, "EVICTED_BYTES", 1 << 10)
    compiled = served("bert").compiled
    found = overhead.measure(compiled, (5, 3), 20, 0)
    assert {part: len(samples) for part, samples in found.items()} == {
        "run above kernels": 20,
        "VM": 20,
        "Python, hot": 20,
        "Python, cold": 2,
        "kernels": 20,
    }
    assert min(found["Python, hot"]) > 0
    assert overhead.quartiles_us({"a": [1e-6, 2e-6, 3e-6]}) == {"a": [1.5, 2.0, 2.5]}
    assert overhead.table({"1x8": found}).row_count == 5
    assert compiled.run([[5]])[0].shape == (1, 32)


def test_overhead_on_the_command_line():
    args = command_line.arguments(["overhead", "--rounds", "7"])
    assert (args.command, args.rounds, args.out) == ("overhead", 7, Path("bench_results"))
