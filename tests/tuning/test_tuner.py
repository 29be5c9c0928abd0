"""The tuner on a tiny model: tries, checks, keeps, goes on; candidates that crash, hang or lie cost one trial each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import turbo_tvm
from turbo_tvm.artifact import file as artifact
from turbo_tvm.compiler.tuning_log import ResultRecord, TuningLog, read_records
from turbo_tvm.errors import TuningError
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.tuning import bench, candidate, tuner
from turbo_tvm.tuning.tasks import buckets, tasks_of
from turbo_tvm.tuning.tune import job
from turbo_tvm.tuning.tuner import Plan, Tuner, task_record
from turbo_tvm.tuning.workers import Workers

pytestmark = pytest.mark.xdist_group("tuner")

KERNEL = "linear_32x64"  # with an activation
LENGTHS = (8, 16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "FINAL_SECONDS", 0.01)
    monkeypatch.setattr(bench, "TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(tuner, "ROUND", 4)
    monkeypatch.setattr(tuner, "_BUILDERS", 1)  # a process costs seconds to start


def tune(path, logs, trials=4, **options):
    options = {"kernels": [KERNEL], "lengths": LENGTHS, "threads": 1, **options}
    return turbo_tvm.tune(path, logs=logs, trials=trials, **options)


def log_file(logs: Path) -> Path:
    (path,) = logs.glob(f"*/{KERNEL}*.jsonl")
    return path


def kinds(path: Path) -> list[str]:
    return [type(record).__name__ for record in read_records(path)]


def check_batches(path: Path) -> None:
    result = next(r for r in read_records(path) if hasattr(r, "variants"))
    assert all(max(lengths) <= max(LENGTHS) for lengths in result.lengths.values())
    assert sum(result.weights.values()) == pytest.approx(1, abs=1e-3)
    assert {rows: sum(lengths) for rows, lengths in result.lengths.items()} == {
        rows: int(rows) for rows in result.lengths
    }


def test_it_keeps_every_trial_and_goes_on_where_it_stopped(tiny_artifact, tmp_path):
    report = tune(tiny_artifact, tmp_path)
    (one,) = report.kernels
    assert (one.trials, one.added, one.failed) == (4, 4, 0) and one.mean_gain > 0
    assert kinds(log_file(tmp_path)) == ["TaskRecord", *["TrialRecord"] * 4, "ResultRecord"]
    check_batches(log_file(tmp_path))
    before = log_file(tmp_path).read_bytes()
    (again,) = tune(tiny_artifact, tmp_path).kernels
    assert (again.trials, again.added) == (4, 0) and log_file(tmp_path).read_bytes() == before
    (more,) = tune(tiny_artifact, tmp_path, trials=6).kernels
    assert (more.trials, more.added) == (6, 2) and log_file(tmp_path).read_bytes().startswith(before)


def test_compile_takes_what_was_found_and_answers_the_same(tiny_folder, tiny_artifact, tmp_path):
    it = job(tiny_artifact, lengths=LENGTHS, logs=tmp_path, kernels=[KERNEL])
    record = task_record(it.tasks[0], it.target)
    setting = {**it.tasks[0].space.default, "near": 4, "group": 2}
    chosen = [{"setting": setting, "max_rows": 16}, {"setting": {}, "max_rows": None}]
    it.log.append(record, [ResultRecord(chosen, {}, {}, {}, {}, trials=0, search="xgb", seed=0)])
    tuned = turbo_tvm.compile(tiny_folder, logs=tmp_path)
    plain = turbo_tvm.compile(tiny_folder, logs=False)
    (spec,) = [kernel for kernel in tuned.manifest.kernels if kernel.name == record.kernel]
    assert [(v.setting, v.max_rows) for v in spec.variants] == [(setting, 16), ({}, 0)]
    assert not any(kernel.variants for kernel in plain.manifest.kernels)
    rng = np.random.default_rng(0)
    for lengths in ([3], [16], [17, 40], [5] * 9):
        requests = [rng.integers(0, 40, n) for n in lengths]
        for a, b in zip(tuned.run(requests), plain.run(requests), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def faulty(faults):
    """A build that makes something else of settings with some value of the knob `ahead`."""

    def build(recipe, variants, target, path):
        import os
        import time

        import tvm
        from tvm import ir, tirx

        from turbo_tvm.compiler import targets
        from turbo_tvm.compiler.kernel_recipe import KernelRecipe
        from turbo_tvm.tuning import candidate

        fault = faults.get(dict(variants[0].setting)["ahead"] if variants else None)
        if fault == "crashes while it is built":
            os.abort()
        if fault == "hangs":
            time.sleep(60)
        if fault == "cannot be built":
            raise ValueError("no such tile")
        if fault not in ("crashes", "lies"):
            candidate.build(recipe, variants, target, path)
            return
        kernel = KernelRecipe.from_json(recipe).build()
        body = tirx.Evaluate(tirx.call_extern("int32", "abort") if fault == "crashes" else 0)
        empty = tirx.PrimFunc(kernel.params, body, kernel.ret_type, kernel.attrs).with_attr("global_symbol", "kernel")
        tvm.compile(ir.IRModule({"kernel": empty}), target=targets.resolve(target)).export_library(path)

    return build


@pytest.mark.slow
def test_faulty_candidates_cost_a_trial_each(tiny_artifact, tmp_path, monkeypatch):
    faults = {
        1024: "crashes while it is built",
        2048: "hangs",
        4096: "cannot be built",
        8192: "crashes",
        16384: "lies",
    }
    it = job(tiny_artifact, lengths=LENGTHS, logs=tmp_path, kernels=[KERNEL])
    monkeypatch.setattr(candidate, "build", faulty(faults))
    monkeypatch.setattr(
        tuner,
        "propose",
        lambda space, seen, *_, **__: [{**space.default, "ahead": a, "near": 4} for a in faults][len(seen) :],
    )
    plan = Plan("cpu", 5, it.buckets, threads=1, timeout_s=20)
    (one,) = Tuner(it.tasks, plan, it.log).run()
    assert (one.trials, one.failed, one.variants) == (5, 5, ())
    known = it.log.read(task_record(it.tasks[0], "cpu"))
    errors = [trial.error for trial in known.trials]
    assert errors[0] == "the process crashed" and errors[1] == "took longer than 20 s"
    assert "no such tile" in errors[2] and errors[3] == "the process crashed" and "wrong answers" in errors[4]


def test_a_default_that_cannot_be_built_is_an_error(tiny_artifact, tmp_path, monkeypatch):
    it = job(tiny_artifact, lengths=LENGTHS, logs=tmp_path, kernels=[KERNEL])
    monkeypatch.setattr(candidate, "build", faulty({None: "cannot be built"}))
    with pytest.raises(TuningError, match=r"cannot be built: .*no such tile"):
        Tuner(it.tasks, Plan("cpu", 1, it.buckets), it.log).run()


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_measured_and_leaves_no_process(tiny_artifact, tmp_path):
    def interrupt(progress):
        if progress.done:
            raise KeyboardInterrupt

    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_artifact, tmp_path, trials=8, show=interrupt)
    assert kinds(log_file(tmp_path)) == ["TaskRecord", *["TrialRecord"] * 4]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and set(psutil.Process().children(recursive=True)) - before:
        time.sleep(0.1)
    assert not set(psutil.Process().children(recursive=True)) - before
    (one,) = tune(tiny_artifact, tmp_path, trials=8).kernels
    assert (one.trials, one.added) == (8, 4)


@pytest.mark.slow
def test_two_tuners_on_one_directory_share_the_work(tiny_artifact, tmp_path):
    code = (
        "import turbo_tvm; from turbo_tvm.tuning import bench, tuner; "
        "bench.FINAL_SECONDS = bench.TRIAL_SECONDS = 0.01; "
        f"turbo_tvm.tune({str(tiny_artifact)!r}, logs={str(tmp_path)!r}, trials=24, kernels=[{KERNEL!r}], "
        f"lengths={LENGTHS}, threads=1, search='random', seed=int(__import__('sys').argv[1]))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(seed)]) for seed in (1, 2)]
    assert [process.wait(300) for process in running] == [0, 0]
    names = kinds(log_file(tmp_path))
    assert names[0] == "TaskRecord" and names.count("TaskRecord") == 1
    assert 24 <= names.count("TrialRecord") < 48 and names.count("ResultRecord") >= 1
    tune(tiny_artifact, tmp_path, trials=24)  # reads all of it


def test_workers_say_why_a_job_has_no_value():
    with Workers(2, 5.0) as workers:
        values = workers.run(eval, [("1 + 1",), ("1 / 0",), ("__import__('os').abort()",), ("3",)])
        assert values[0] == 2 and values[3] == 3
        assert "ZeroDivisionError" in str(values[1]) and str(values[2]) == "the process crashed"
        assert str(workers.run(time.sleep, [(30,)])[0]) == "took longer than 5 s"
        assert workers.run(os.getpid, [()])[0] != os.getpid()


def test_arguments_that_cannot_be(tiny_artifact, tmp_path):
    for options, message in (
        ({"trials": 0}, "at least one trial"),
        ({"search": "grid"}, "unknown search 'grid'"),
        ({"kernels": ["softmax"]}, "nothing to tune called"),
        ({"tracker": "host:1"}, "needs both"),
        ({"tracker": "host", "key": "k"}, "not 'host:port'"),
        ({"lengths": [4000]}, "none of the lengths"),
        ({"target": "cpu:x86-64-v3"}, "leave target out"),
    ):
        with pytest.raises(TuningError, match=message):
            tune(tiny_artifact, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_not_this_machine(tiny_folder, tmp_path):
    with pytest.raises(TuningError, match="measured on a GPU: start a server there"):
        turbo_tvm.tune(tiny_folder, target="cuda:sm_80", logs=tmp_path)


def test_every_kernel_with_knobs_is_a_task(tiny_artifact):
    names = [task.kernel for task in tasks_of(artifact.read(tiny_artifact).manifest.kernels)]
    assert {name.split("_")[0] for name in names} >= {"linear", "attention", "embedding"}


def test_measuring_runs_every_family(tiny_artifact, tmp_path):
    for number, task in enumerate(tasks_of(artifact.read(tiny_artifact).manifest.kernels)):
        last = {knob.name: knob.values[-1] for knob in task.space.knobs}
        paths = [str(tmp_path / f"{name}_{number}.so") for name in ("default", "candidate")]
        for path, variants in zip(paths, [(), (Variant(tuple(last.items())),)], strict=True):
            candidate.build(task.recipe.to_json(), variants, "cpu", path)
        found = buckets((8, 16), 40)
        seconds = candidate.measure(
            task.recipe.to_json(), *paths, [b.lengths for b in found], candidate.Effort(0.01, threads=1)
        )
        assert set(seconds) == {b.rows for b in found} and all(min(map(min, pairs)) > 0 for pairs in seconds.values())


def test_a_log_of_the_target_is_found_by_its_cpu(tiny_artifact, tmp_path):
    it = job(tiny_artifact, logs=tmp_path)
    assert it.log.directory == TuningLog(tmp_path, task_record(it.tasks[0], "cpu").target).directory
