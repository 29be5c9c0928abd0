"""Logs of the tuner: what is damaged is named and never overwritten, and several processes may write at once."""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbo_tvm.compiler import tuning_log as logs
from turbo_tvm.compiler.tuning_log import KernelLog, ResultRecord, TaskRecord, TrialRecord, TuningLog
from turbo_tvm.errors import TuningLogError
from turbo_tvm.schedules.common.space import Variant

TASK = TaskRecord("linear_8_8", '{"family":"cpu.linear.linear"}', 1, "znver4", "0.27.0")
OTHERS = [
    replace(TASK, tvm="0.28.0"),
    replace(TASK, kernel_version=2),
    replace(TASK, target="znver5"),
    replace(TASK, recipe='{"family":"cpu.linear_amx.linear"}'),
    replace(TASK, format=2),
]


def trial(number=0, **more):
    seconds = {"16": [[1e-5, 8e-6]], "256": [[1e-4, 2e-4], [1.1e-4, 2e-4]]}
    return TrialRecord({"a": number}, "xgb", 7, seconds, "", "a CPU, “4 cores”", 4, "2026-01-01", **more)


RESULT = ResultRecord(
    variants=[{"setting": {"b": 2, "a": 1}, "max_rows": 32}, {"setting": {}, "max_rows": None}],
    gains={"16": 1.25, "256": 1.0},
    seconds={"16": [[1e-5, 8e-6]]},
    lengths={"16": [8, 8], "256": [200, 56]},
    weights={"16": 0.25, "256": 0.75},
    trials=2,
    search="xgb",
    seed=7,
)
FAILED = TrialRecord({"a": 9}, "random", 1, error='wrong answers\n"off" by 3\\')


@pytest.fixture
def log(tmp_path):
    return TuningLog(tmp_path, "znver4")


@pytest.fixture
def written(log):
    """A log with two trials and a result, and its file."""
    log.append(TASK, [trial(1), FAILED])
    log.append(TASK, [RESULT])
    return log, log.path(TASK.kernel)


def test_what_is_written_is_read(written):
    log, path = written
    assert path == log.directory / "linear_8_8.jsonl"
    assert log.read(TASK) == KernelLog(TASK, (trial(1), FAILED), (RESULT,))
    assert log.read(TASK).result == RESULT
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["task", "trial", "trial", "result"]


def test_nothing_is_known_of_a_kernel_without_a_file(log):
    assert log.read(TASK) == KernelLog(None) and log.read(TASK).result is None
    assert not log.directory.exists()


def test_the_last_result_counts(written):
    log, _ = written
    log.append(TASK, [trial(2), replace(RESULT, trials=3)])
    assert log.read(TASK).result.trials == 3 and len(log.read(TASK).results) == 2


def test_variants_of_a_result():
    assert RESULT.as_variants() == (Variant((("a", 1), ("b", 2)), 32), Variant((), None))
    default = replace(RESULT, variants=[{"setting": {}, "max_rows": None}])
    assert default.as_variants() == ()


positive = st.floats(0, 1e6)
pairs = st.dictionaries(st.text(), st.lists(st.lists(positive, min_size=2, max_size=2)), max_size=3)
trials = st.builds(
    TrialRecord,
    setting=st.dictionaries(st.text(), st.integers()),
    search=st.text(),
    seed=st.integers(),
    seconds=pairs,
    error=st.text(),
    machine=st.text(),
    threads=st.integers(),
    time=st.text(),
)


@settings(max_examples=100, deadline=None)
@given(trials)
def test_any_record_is_a_line_and_comes_back(record):
    line = logs.encode(record)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert logs.decode(line[:-1]) == record


def test_a_line_leaves_out_what_says_nothing():
    written = json.loads(logs.encode(TrialRecord({"a": 0}, "xgb", 0)))
    assert set(written) == {"kind", "setting", "search", "seed", "crc"}
    assert set(json.loads(logs.encode(replace(TASK, kernel_version=0)))) >= {"kernel_version", "format"}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_named_with_its_line(tmp_path, data):
    log = TuningLog(tmp_path, "znver4")
    path = log.path(TASK.kernel)
    if not path.exists():
        log.append(TASK, [trial(1), FAILED, RESULT])
        (tmp_path / "whole").write_bytes(path.read_bytes())
    whole = (tmp_path / "whole").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(
        st.one_of(st.sampled_from([10, 13, 32, 34]), st.integers(0, 255)).filter(lambda b: b != whole[place])
    )
    path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    damaged = path.read_bytes()
    number = whole[:place].count(b"\n") + 1
    with pytest.raises(TuningLogError, match=rf"line {number} of the tuning log {re.escape(str(path))} .*--repair"):
        log.read(TASK)
    with pytest.raises(TuningLogError, match=rf"line {number} of"):
        log.append(TASK, [trial(2)])
    assert path.read_bytes() == damaged, "a reader touches nothing"


def test_cut_at_every_byte_of_its_last_line(written):
    """As after a crash: what is whole is refused together with the rest, and nothing is appended behind a part."""
    log, path = written
    whole = path.read_bytes()
    begin = whole[:-1].rindex(b"\n") + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        if end == begin:
            assert log.read(TASK) == KernelLog(TASK, (trial(1), FAILED))
            continue
        for use in (log.read, lambda task: log.append(task, [trial(2)])):
            with pytest.raises(
                TuningLogError, match=rf"line 4 of the tuning log {re.escape(str(path))} was written in"
            ):
                use(TASK)
        assert path.read_bytes() == whole[:end]


def test_a_cut_line_is_moved_aside_and_work_goes_on(written):
    log, path = written
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert logs.repair(log.directory.parent) == {path: 1}
    assert log.read(TASK) == KernelLog(TASK, (trial(1), FAILED))
    assert (path.parent / "linear_8_8.jsonl.damaged").read_bytes() == whole.splitlines(True)[-1][:-10] + b"\n"
    log.append(TASK, [RESULT])
    assert path.read_bytes() == whole


def test_a_line_that_lacks_its_end_alone_is_kept(written):
    log, path = written
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert logs.repair(log.directory.parent) == {path: 0}
    assert path.read_bytes() == whole and not path.with_name(path.name + ".damaged").exists()


def test_repair_moves_damaged_lines_and_leaves_others(written):
    log, path = written
    other = TuningLog(log.directory.parent, "znver5")
    other.append(replace(TASK, target="znver5"), [trial(1)])
    lines = path.read_bytes().splitlines(True)
    bad = lines[2].replace(b"wrong", b"Wrong")
    path.write_bytes(b"".join([*lines[:2], bad, *lines[3:]]))
    untouched = other.path(TASK.kernel).read_bytes()
    assert logs.repair(log.directory.parent) == {path: 1}
    assert path.read_bytes() == b"".join([*lines[:2], *lines[3:]])
    assert path.with_name(path.name + ".damaged").read_bytes() == bad
    assert other.path(TASK.kernel).read_bytes() == untouched
    assert logs.repair(log.directory.parent) == {}


def test_repair_gives_no_task_what_was_measured_for_another(log):
    """The line that names a task is damaged: what follows it may not be taken for the task before."""
    log.append(TASK, [trial(1)])
    log.append(OTHERS[0], [trial(2), RESULT])
    log.append(TASK, [trial(3)])
    path = log.path(TASK.kernel)
    lines = path.read_bytes().splitlines(True)
    assert len(lines) == 7
    for place in (0, 5, 12, 40, len(lines[2]) - 2):
        bad = lines[2][:place] + b"#" + lines[2][place + 1 :]
        path.write_bytes(b"".join([*lines[:2], bad, *lines[3:]]))
        aside = path.with_name(path.name + ".damaged")
        assert logs.repair(log.directory) == {path: 3}
        assert log.read(TASK) == KernelLog(TASK, (trial(1), trial(3)))
        assert aside.read_bytes() == b"".join([bad, *lines[3:5]])
        aside.unlink()


def test_a_log_whose_first_line_is_damaged_can_be_repaired(written):
    log, path = written
    path.write_bytes(b"#" + path.read_bytes()[1:])
    assert logs.repair(log.directory.parent) == {path: 4}
    assert log.read(TASK) == KernelLog(None)
    log.append(TASK, [trial(5)])
    assert log.read(TASK).trials == (trial(5),)


def test_repair_of_nothing(tmp_path):
    assert logs.repair(tmp_path / "missing") == {} and logs.repair(tmp_path) == {}


@pytest.mark.parametrize(
    "text", ["\n", "hello\n", "{}\n", '{"kind":"task","crc":"00000000"}\n', "[1]\n", "\0\n", "\xff\n"]
)
def test_what_is_no_log_is_refused(log, text):
    log.directory.mkdir()
    log.path(TASK.kernel).write_text(text, "latin-1")
    with pytest.raises(TuningLogError, match=r"line 1 of the tuning log .* is damaged or not a tuner's"):
        log.read(TASK)


@pytest.mark.parametrize(
    "record",
    [
        replace(TASK, kernel_version="1"),
        replace(TASK, recipe=None),
        replace(trial(1), setting=[1]),
        replace(trial(1), seconds=None),
        replace(FAILED, error=1),
        replace(RESULT, weights=1.0),
    ],
    ids=["version", "recipe", "setting", "seconds", "error", "weights"],
)
def test_fields_of_other_types_are_no_tuners(record):
    """Although the checksum is right."""
    assert logs.decode(logs.encode(record)[:-1]) is None


def test_a_line_that_is_deeply_nested_is_refused():
    text = '{"kind":"trial","setting":' + "[" * 100_000 + "}"
    assert logs.decode(f'{text[:-1]},"crc":"{logs._crc(text)}"}}'.encode()) is None


def test_a_log_that_names_no_task_is_refused(log):
    log.directory.mkdir()
    log.path(TASK.kernel).write_bytes(logs.encode(trial(1)))
    with pytest.raises(TuningLogError, match="its first line does not name a task"):
        log.read(TASK)


def test_a_directory_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "znver4").write_text("a file")
    with pytest.raises(TuningLogError, match=r"the tuning log .*linear_8_8\.jsonl cannot be written"):
        TuningLog(tmp_path, "znver4").append(TASK, [trial(1)])
    log = TuningLog(tmp_path, "znver5")
    log.path(TASK.kernel).mkdir(parents=True)
    with pytest.raises(TuningLogError, match="cannot be read"):
        log.read(TASK)


@pytest.mark.parametrize("other", OTHERS, ids=["tvm", "version", "target", "recipe", "format"])
def test_measurements_of_another_task_are_kept_but_not_taken(log, other):
    log.append(other, [trial(1), RESULT])
    assert log.read(TASK) == KernelLog(None, others=(other,))
    log.append(TASK, [trial(2)])
    log.append(TASK, [trial(3)])
    log.append(other, [trial(4)])
    assert log.read(TASK) == KernelLog(TASK, (trial(2), trial(3)), others=(other, other))
    assert log.read(other) == KernelLog(other, (trial(1), trial(4)), (RESULT,), others=(TASK,))


def test_differences_in_words():
    assert TASK.differences(TASK) == []
    assert [TASK.differences(other) for other in OTHERS] == [
        ["TVM '0.28.0' instead of '0.27.0'"],
        ["kernel version 2 instead of 1"],
        ["target 'znver5' instead of 'znver4'"],
        ["another kernel of that name"],
        ["log format 2 instead of 1"],
    ]
    many = replace(TASK, tvm="1", kernel_version=3, recipe="{}")
    assert TASK.differences(many) == ["TVM '1' instead of '0.27.0'", "kernel version 3 instead of 1"]


WRITER = """
import json
import sys
from pathlib import Path
from turbo_tvm.compiler.tuning_log import TaskRecord, TrialRecord, TuningLog

task, number = TaskRecord(**json.loads(sys.argv[2])), int(sys.argv[3])
log = TuningLog(Path(sys.argv[1]), "znver4")
for i in range(200):
    log.append(task, [TrialRecord({"a": i}, "xgb", number, error="x" * 50)])
"""


def test_two_processes_write_at_once(log):
    """Each its own task: every record is there, under its task and in order."""
    tasks = TASK, OTHERS[0]
    command = [sys.executable, "-c", WRITER, str(log.directory.parent)]
    running = [subprocess.Popen([*command, json.dumps(asdict(task)), str(i)]) for i, task in enumerate(tasks)]
    assert [process.wait() for process in running] == [0, 0]
    for number, task in enumerate(tasks):
        found = log.read(task).trials
        assert [trial.setting["a"] for trial in found] == list(range(200))
        assert {trial.seed for trial in found} == {number}


def test_a_line_that_is_being_written_is_waited_for(log):
    """Others see a write of several pages before it is whole."""
    log.append(TASK, [trial(1)])
    line = logs.encode(trial(2))
    with ThreadPoolExecutor(1) as pool, log.path(TASK.kernel).open("ab", buffering=0) as file:
        with FileLock(log.directory / ".lock"):
            file.write(line[:30])
            reading = pool.submit(log.read, TASK)
            with pytest.raises(concurrent.futures.TimeoutError):
                reading.result(timeout=0.3)
            file.write(line[30:])
        assert reading.result(timeout=60).trials == (trial(1), trial(2))


def test_nothing_is_read_into_a_log_by_its_path(tmp_path):
    """A directory per target, a file per kernel."""
    a, b = TuningLog(tmp_path, "znver4"), TuningLog(tmp_path, "znver5")
    a.append(TASK, [trial(1)])
    a.append(replace(TASK, kernel="other"), [trial(2)])
    assert b.read(TASK) == KernelLog(None)
    assert sorted(p.name for p in a.directory.glob("*.jsonl")) == ["linear_8_8.jsonl", "other.jsonl"]
