"""`turbo-tvm tune` and what `compile` and `inspect` say of tuning: tables, JSON, the picture, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import fail, invoke, succeed

from turbo_tvm.artifact import file as artifact
from turbo_tvm.cli import tune_report
from turbo_tvm.cli.tune import duration, status_line
from turbo_tvm.compiler.tuning_log import ResultRecord, TrialRecord, TuningLog, read_records
from turbo_tvm.profiling import machine_limits
from turbo_tvm.profiling.roofline import MachineLimits
from turbo_tvm.tuning import bench, report, tuner
from turbo_tvm.tuning.report import Curve
from turbo_tvm.tuning.tune import job
from turbo_tvm.tuning.tuner import Progress, task_record

pytestmark = pytest.mark.xdist_group("tuner")

KERNEL = "linear_32x64"
OPTIONS = ("--kernel", KERNEL, "--lengths", "8,16", "--threads", "1")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    limits = MachineLimits("a CPU", 1, "0", 1e12, 2e12, 1e10, 2e10, 1e11, 1 << 25)
    monkeypatch.setattr(machine_limits, "machine_limits", lambda *_, **__: limits)
    for module, name in ((bench, "FINAL_SECONDS"), (bench, "TRIAL_SECONDS"), (report, "SECONDS")):
        monkeypatch.setattr(module, name, 0.01)
    monkeypatch.setattr(tuner, "ROUND", 4)
    monkeypatch.setattr(tuner, "_BUILDERS", 1)


def keep(tiny_artifact: Path, logs: Path, setting: dict[str, int]) -> str:
    """A log that has found this setting; the kernel's name."""
    it = job(tiny_artifact, logs=logs, kernels=[KERNEL])
    record = task_record(it.tasks[0], it.target)
    chosen = [{"setting": {**it.tasks[0].space.default, **setting}, "max_rows": 16}, {"setting": {}, "max_rows": None}]
    it.log.append(record, [ResultRecord(chosen, {}, {}, {}, {"16": 1.0}, trials=0, search="xgb", seed=0)])
    return record.kernel


def test_tune_then_report(tiny_artifact: Path, tmp_path: Path):
    where = ("--logs", tmp_path)
    plain = json.loads(succeed("tune", tiny_artifact, *OPTIONS, *where, "--trials", "4", "--json"))
    (kernel,) = plain["kernels"]
    assert kernel["kernel"].startswith(KERNEL) and kernel["trials"] == 4 and set(kernel["gains"]) >= {"16"}
    result = invoke("tune", tiny_artifact, *OPTIONS, *where, "--trials", "4")
    assert result.exit_code == 0 and f"--logs {tmp_path}" in result.stdout
    assert "x the default (4 trials)" in result.stderr
    text = succeed("tune", tiny_artifact, *OPTIONS, *where, "--report", "--plot", tmp_path / "search.svg")
    assert "geometric mean" in text and kernel["kernel"] in text
    assert (tmp_path / "search.svg").read_bytes().startswith(b"<?xml")
    plain = json.loads(succeed("tune", tiny_artifact, *OPTIONS, *where, "--report", "--json"))
    assert {sum(one["lengths"]) for one in plain["kernels"]} >= {16} and plain["limits"]["cpu"] == "a CPU"
    assert all(one["gain"] > 0 and len(one["pairs"]) >= 5 for one in plain["kernels"])


def test_compile_and_inspect_say_what_was_tuned(tiny_folder: Path, tiny_artifact: Path, tmp_path: Path):
    logs, path = tmp_path / "logs", tmp_path / "tuned.turbo"
    name = keep(tiny_artifact, logs, {"near": 4})
    assert ", 1 tuned" in succeed("compile", tiny_folder, "-o", path, "--logs", logs)
    text = succeed("inspect", path)
    assert "Tuned kernels" in text and "near=4" in text and "default" in text
    (spec,) = [kernel for kernel in artifact.read(path).manifest.kernels if kernel.variants]
    assert spec.name == name and [v.max_rows for v in spec.variants] == [16, 0]
    assert " tuned" not in succeed("compile", tiny_folder, "-o", path, "--no-logs")
    assert "Tuned kernels" not in succeed("inspect", path)


def test_compile_names_logs_that_do_not_hold(tiny_folder: Path, tiny_artifact: Path, tmp_path: Path):
    logs, path = tmp_path / "logs", tmp_path / "plain.turbo"
    name = keep(tiny_artifact, logs, {"near": 4})
    (file,) = logs.glob("*/*.jsonl")
    it = job(tiny_artifact, logs=logs, kernels=[KERNEL])
    records = [json.loads(line) for line in file.read_text().splitlines()]
    from dataclasses import replace

    from turbo_tvm.compiler import tuning_log as log

    old = replace(task_record(it.tasks[0], it.target), tvm="0.26.0")
    (result,) = [log.decode(line) for line in file.read_bytes().splitlines() if b'"result"' in line]
    file.write_bytes(log.encode(old) + log.encode(result))
    assert len(records) == 2
    done = invoke("compile", tiny_folder, "-o", path, "--logs", logs)
    assert (
        done.exit_code == 0 and f"note: not tuned, {name}: " in done.stderr and "TVM '0.26.0' instead of" in done.stderr
    )
    assert "Tuning logs that did not hold" in succeed("inspect", path)


def test_a_damaged_log_is_an_error_and_can_be_repaired(tiny_folder: Path, tiny_artifact: Path, tmp_path: Path):
    logs = tmp_path / "logs"
    keep(tiny_artifact, logs, {"near": 4})
    (file,) = logs.glob("*/*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    text = fail("compile", tiny_folder, "-o", tmp_path / "x.turbo", "--logs", logs)
    assert f"line 2 of the tuning log {file} was written in part" in text and f"--repair --logs {logs}" in text
    assert file.read_bytes() == whole[:-20] and not (tmp_path / "x.turbo").exists()
    assert "1 damaged line moved" in succeed("tune", "--repair", "--logs", logs)
    assert file.with_name(file.name + ".damaged").exists()
    assert "no line is damaged" in succeed("tune", "--repair", "--logs", logs)
    succeed("compile", tiny_folder, "-o", tmp_path / "x.turbo", "--logs", logs)


def test_logs_can_be_compacted(tiny_artifact: Path, tmp_path: Path):
    keep(tiny_artifact, tmp_path, {"near": 4})
    (file,) = tmp_path.glob("*/*.jsonl")
    task, *_ = read_records(file)
    trial = TrialRecord({"near": 4}, "xgb", 0, {"16": [[1e-5, 8e-6], [1.2e-5, 9e-6]]})
    TuningLog(tmp_path, file.parent.name).append(task, [trial])
    before = file.stat().st_size
    text = succeed("tune", "--compact", "--logs", tmp_path)
    assert f"{file}: {before - file.stat().st_size:,} bytes smaller" in text and file.stat().st_size < before
    assert "nothing to shrink" in succeed("tune", "--compact", "--logs", tmp_path)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("tune",), 2, "Missing argument 'MODEL'"),
        (("tune", "nothing.turbo"), 1, "there is no model at nothing.turbo"),
        (("tune", "x.turbo", "--plot", "x.gif"), 2, "must end in .png or .svg"),
        (("tune", "--repair", "--logs", "nowhere"), 1, "no directory of tuning logs at nowhere"),
        (("tune", "--compact", "--logs", "nowhere"), 1, "no directory of tuning logs at nowhere"),
        (("tune-server", "--tracker", "box", "--key", "k"), 1, "is not 'host:port'"),
        (("compile", "m", "-o", "x.turbo", "--logs", "a", "--no-logs"), 2, "exclude each other"),
    ],
)
def test_errors(args, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*args, code=code)


def test_logs_that_are_not_there(tiny_folder: Path, tmp_path: Path):
    text = fail("compile", tiny_folder, "-o", tmp_path / "x.turbo", "--logs", tmp_path / "nowhere")
    assert "there is no directory of tuning logs" in text


def test_nothing_to_report(tiny_artifact: Path, tmp_path: Path):
    assert "tune them first" in fail("tune", tiny_artifact, "--report", "--logs", tmp_path, *OPTIONS)


def test_status_line():
    p = Progress("linear_8", 2, 5, done=8, trials=64, best=1.05, gflops=1234.5, seconds_left=700.0, note="timing")
    assert status_line(p) == "linear_8 (2 of 5): trial 8 of 64, best 1.050x, 1,234 GFLOP/s, 12 min left (timing)"
    assert [duration(s) for s in (5.4, 99, 600, 7200)] == ["5 s", "99 s", "10 min", "2.0 h"]


def test_picture(tmp_path: Path):
    curves = [Curve("a", "xgb", (1.0, 1.1, 1.2)), Curve("b", "xgb", (1.0, 1.0)), Curve("a", "random", (1.0, 1.05))]
    tune_report.draw(curves, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
