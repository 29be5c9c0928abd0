"""The pages of the tuning logs say what the logs say; and the logs that ship hold for the kernels that are built."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from benchmark import tuning, tuning_pages
from rich.console import Console

from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.compiler.tuning_log import ResultRecord, TaskRecord, TrialRecord, TuningLog, read_records
from turbo_tvm.schedules.common.space import checked

LOGS = Path(__file__).resolve().parents[2] / "tuning_logs"
TARGETS = sorted(path for path in LOGS.iterdir() if path.is_dir() and any(path.glob("*.jsonl")))
FILES = [path for target in TARGETS for path in sorted(target.glob("*.jsonl"))]


def test_a_page_of_logs(tmp_path):
    task = TaskRecord("linear_8", "{}", 1, "znver9", "0.27")
    pairs = {"16": [[1.0, 0.8]]}
    trials = [TrialRecord({"a": 1}, "xgb", 3, pairs), TrialRecord({"a": 2}, "xgb", 3, error="the process crashed")]
    chosen = [{"setting": {"a": 1}, "max_rows": 32}, {"setting": {}, "max_rows": None}]
    gains = {"16": 1.25, "8192": 1.0}
    result = ResultRecord(
        chosen, gains, pairs, {}, {}, 2, "xgb", 3, machine="a CPU", threads=2, time="2026-01-02T03:04:05"
    )
    TuningLog(tmp_path, "znver9").append(task, [*trials, result])
    assert tuning_pages.run(tmp_path, Console(quiet=True)) == 1
    text = (tmp_path / "znver9" / "README.md").read_text()
    assert "machine: a CPU; threads: 2" in text and "`--search xgb --seed 3`" in text and "2026-01-02" in text
    assert "| `linear_8` | 2 | 1 | 2 | 1.250x | 1.000x |" in text
    assert tuning_pages.run(tmp_path / "znver9", Console(quiet=True)) == 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.name)
def test_the_page_is_true(target):
    assert (target / "README.md").read_text() == tuning_pages.page(target), "run scripts/bench logs"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_log_that_ships_holds(path):
    records = list(read_records(path))
    task = [record for record in records if isinstance(record, TaskRecord)][-1]
    recipe = KernelRecipe.from_json(task.recipe)
    assert (task.kernel, task.target, task.tvm) == (path.stem, path.parent.name, tvm.__version__)
    assert task.kernel_version == recipe.version
    result = [record for record in records if isinstance(record, ResultRecord)][-1]
    checked(result.as_variants(), recipe.space)
    assert all(gain >= 1 for gain in result.gains.values())


def test_a_page_of_whole_models():
    samples = {"default": [2.0, 2.2], "tuned": [1.0, 1.1]}
    found = {
        "compile_s": {"default": [10.0], "tuned": [11.0]},
        "variants": {"linear_8": 2},
        "workloads": [{"name": "1x8", "label": "1 x 8", "kind": "grid", "samples_s": samples}],
    }
    machine = {"cpu": "a CPU", "threads": 2, "packages": {"apache-tvm": "0"}}
    report = {"machine": machine, "command": "scripts/bench tuning", "started": "now", "revision": "abc"}
    text = tuning.markdown(tuning.summarized({**report, "models": {"bert fp32": found}}))
    assert (
        "geometric mean **2.000x**, least 2.000x, 1 points" in text and "| 1 x 8 | 2100 ms | 1050 ms | 2.000x |" in text
    )
    assert "10.0 s, with logs 11.0 s (+1.0 s)" in text and "linear_8" in text
