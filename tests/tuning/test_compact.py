"""Compacted logs: smaller, with the same tasks, results and gains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from turbo_tvm.compiler.tuning_log import ResultRecord, TaskRecord, TrialRecord, TuningLog, decode
from turbo_tvm.errors import TuningLogError
from turbo_tvm.tuning.candidate import gains
from turbo_tvm.tuning.compact import compact, compacted
from turbo_tvm.tuning.tuner import observations

TASK = TaskRecord("linear_8_8", '{"family":"cpu.linear.linear"}', 1, "znver4", "0.27.0")
SECONDS = {
    "16": [[1.0e-5, 8e-6], [1.2e-5, 9e-6], [9e-6, 8.5e-6]],  # the median of the ratios is the lesser measure
    "256": [[2e-4, 1e-4], [1.1e-4, 1.05e-4], [2.1e-4, 1.1e-4]],  # best over best is
}
TRIAL = TrialRecord({"a": 1}, "xgb", 7, SECONDS, "", "a CPU, “4 cores”", 4, "2026-01-01")
FAILED = TrialRecord({"a": 9}, "random", 1, error="wrong answers")
RESULT = ResultRecord(
    variants=[{"setting": {"a": 1}, "max_rows": None}],
    gains={"16": 1.25},
    seconds={"16": SECONDS["16"]},
    lengths={"16": [8, 8]},
    weights={"16": 1.0},
    trials=2,
    search="xgb",
    seed=7,
)


@pytest.fixture
def written(tmp_path):
    """A log and its file."""
    log = TuningLog(tmp_path, "znver4")
    log.append(TASK, [TRIAL, FAILED, RESULT])
    return log, log.path(TASK.kernel)


def test_a_trial_keeps_everything_but_its_samples():
    made = compacted(TRIAL)
    assert replace(made, seconds=SECONDS) == TRIAL
    assert {rows: len(pairs) for rows, pairs in made.seconds.items()} == {"16": 1, "256": 1}
    assert [made.seconds[rows][0][0] for rows in ("16", "256")] == [1.0e-5, 2e-4], "the default's median"


@pytest.mark.parametrize("rows", SECONDS)
def test_the_pair_that_is_left_gains_what_all_gained(rows):
    before, after = gains({0: SECONDS[rows]}), gains({0: compacted(TRIAL).seconds[rows]})
    assert after[0] == pytest.approx(before[0], rel=1e-4)


def test_a_machine_is_not_repeated_where_the_result_names_it():
    here = replace(RESULT, machine=TRIAL.machine, threads=TRIAL.threads)
    made = compacted(TRIAL, here)
    assert (made.machine, made.threads, made.time) == ("", 0, TRIAL.time)
    assert compacted(TRIAL, replace(here, machine="another")) == compacted(TRIAL, RESULT) == compacted(TRIAL)


def test_a_failed_trial_stays():
    assert compacted(FAILED) == FAILED


def test_tasks_and_results_stay_byte_by_byte(written):
    log, path = written
    before = path.read_bytes().splitlines()
    assert compact(log.directory.parent) == {path: len(b"\n".join(before)) + 1 - path.stat().st_size}
    after = path.read_bytes().splitlines()
    assert [after[i] for i in (0, 2, 3)] == [before[i] for i in (0, 2, 3)]
    assert len(after[1]) < len(before[1]) and decode(after[1]) == compacted(TRIAL, RESULT)
    assert log.read(TASK).result == RESULT


def test_a_search_that_goes_on_has_seen_the_same(written):
    log, _ = written
    before = observations(log.read(TASK).trials)
    compact(log.directory.parent)
    after = observations(log.read(TASK).trials)
    assert [one.setting for one in after] == [one.setting for one in before]
    for one, other in zip(after, before, strict=True):
        assert one.gains == pytest.approx(other.gains, rel=1e-4)


def test_compacting_twice_changes_nothing(written):
    log, path = written
    compact(log.directory.parent)
    once = path.read_bytes()
    assert compact(log.directory.parent) == {} and path.read_bytes() == once


def test_a_damaged_log_is_named_and_left_alone(written):
    log, path = written
    damaged = path.read_bytes().replace(b"xgb", b"xgc", 1)
    path.write_bytes(damaged)
    with pytest.raises(TuningLogError, match="line 2"):
        compact(log.directory.parent)
    assert path.read_bytes() == damaged
