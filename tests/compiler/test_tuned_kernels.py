"""What the compiler takes from logs: variants where they hold, and the reason where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sized_operators as sized
import tvm

from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler import targets
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.compiler.tuned_kernels import SHIPPED, Applied, applied
from turbo_tvm.compiler.tuning_log import ResultRecord, TaskRecord, TrialRecord, TuningLog, read_records
from turbo_tvm.errors import TuningLogError
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.schedules.cpu import linear, tiles

RECIPE = KernelRecipe.of(sized.linear(tiles.AVX2, 8, 8), tiles.AVX2).to_json()
SPEC = KernelSpec("linear_8_8", "linear", 1, recipe=RECIPE)
TARGET = targets.log_name("cpu")
TASK = TaskRecord("linear_8_8", RECIPE, linear.VERSION, TARGET, tvm.__version__)
TRIAL = TrialRecord({"group": 2}, "xgb", 0, {"16": [[1.1, 1.0]]})


def result(*variants):
    """A result of (setting, max_rows)."""
    made = [{"setting": setting, "max_rows": max_rows} for setting, max_rows in variants]
    return ResultRecord(made, {"16": 1.1}, {}, {"16": [16]}, {"16": 1.0}, 1, "xgb", 0)


BETTER = result(({"group": 2, "block_rows": 24}, 32), ({}, None))
DEFAULT = result(({}, None))
VARIANTS = (Variant((("block_rows", 24), ("group", 2)), 32), Variant((), None))


@pytest.fixture
def log(tmp_path):
    return TuningLog(tmp_path, TARGET)


def test_the_variants_of_a_result(tmp_path, log):
    log.append(TASK, [TRIAL, BETTER])
    found = applied([SPEC, replace(SPEC, name="other")], "cpu", tmp_path)
    assert found == Applied({"linear_8_8": VARIANTS})
    KernelRecipe.from_json(RECIPE).build((), found.variants["linear_8_8"])


def test_the_last_result_counts(tmp_path, log):
    log.append(TASK, [DEFAULT, BETTER])
    assert applied([SPEC], "cpu", tmp_path).variants
    log.append(TASK, [DEFAULT])
    assert applied([SPEC], "cpu", tmp_path) == Applied(as_default=("linear_8_8",))


def test_a_log_without_a_result_says_nothing(tmp_path, log):
    log.append(TASK, [TRIAL])
    assert applied([SPEC], "cpu", tmp_path) == Applied()


@pytest.mark.parametrize(
    "other,reason",
    [
        (replace(TASK, tvm="0.1"), f"measured with TVM '0.1' instead of '{tvm.__version__}'"),
        (replace(TASK, kernel_version=99), f"measured with kernel version 99 instead of {linear.VERSION}"),
        (replace(TASK, target="i386"), f"measured with target 'i386' instead of '{TARGET}'"),
        (replace(TASK, recipe="{}"), "measured with another kernel of that name"),
        (replace(TASK, format=0), "measured with log format 0 instead of 1"),
        (
            replace(TASK, tvm="0.1", kernel_version=99),
            f"measured with TVM '0.1' instead of '{tvm.__version__}'; kernel version 99 instead of {linear.VERSION}",
        ),
    ],
    ids=["tvm", "version", "target", "recipe", "format", "two"],
)
def test_a_log_that_does_not_hold_is_refused_with_the_reason(tmp_path, log, other, reason):
    """The kernel is then built as it is by itself; the others have theirs."""
    log.append(other, [TRIAL, BETTER])
    log.append(replace(TASK, kernel="second"), [BETTER])
    found = applied([SPEC, replace(SPEC, name="second")], "cpu", tmp_path)
    assert found.refused == {"linear_8_8": f"{log.path('linear_8_8')}: {reason}"}
    assert found.variants == {"second": VARIANTS} and not found.as_default


def test_the_reason_is_that_of_the_latest_measurements(tmp_path, log):
    log.append(replace(TASK, tvm="0.1"), [BETTER])
    log.append(replace(TASK, kernel_version=99), [BETTER])
    assert "kernel version 99" in applied([SPEC], "cpu", tmp_path).refused["linear_8_8"]


def test_measurements_that_do_not_hold_are_no_matter_beside_those_that_do(tmp_path, log):
    log.append(replace(TASK, tvm="0.1"), [DEFAULT])
    log.append(TASK, [BETTER])
    log.append(replace(TASK, tvm="0.2"), [DEFAULT])
    assert applied([SPEC], "cpu", tmp_path) == Applied({"linear_8_8": VARIANTS})


def test_an_unfinished_log_is_no_refusal_although_an_old_one_is_there(tmp_path, log):
    log.append(replace(TASK, tvm="0.1"), [BETTER])
    log.append(TASK, [TRIAL])
    assert applied([SPEC], "cpu", tmp_path) == Applied()


def test_logs_of_another_target_are_not_looked_at(tmp_path):
    other = TuningLog(tmp_path, "i386")
    other.append(TASK, [BETTER])
    assert applied([SPEC], "cpu", tmp_path) == Applied()


def test_kernels_without_a_recipe_have_no_log(tmp_path, log):
    log.append(TASK, [BETTER])
    assert applied([replace(SPEC, recipe="")], "cpu", tmp_path) == Applied()


def test_a_directory_that_is_missing_or_empty(tmp_path):
    assert applied([SPEC], "cpu", tmp_path / "missing") == Applied()
    assert applied([SPEC], "cpu", tmp_path) == Applied()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_log_is_an_error(tmp_path, log):
    log.append(TASK, [TRIAL, BETTER])
    path = log.path("linear_8_8")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"group":2', b'"group":4', 1))
    with pytest.raises(TuningLogError, match=r"line 2 of the tuning log .*linear_8_8\.jsonl is damaged"):
        applied([SPEC], "cpu", tmp_path)
    path.write_bytes(whole[:-1])
    with pytest.raises(TuningLogError, match=r"line 3 of .* was written in part"):
        applied([SPEC], "cpu", tmp_path)


@pytest.mark.parametrize(
    "variants,message",
    [
        ([({"unroll": 2}, None)], "there is no knob 'unroll'"),
        ([({"group": 3}, None)], "knob group cannot be 3"),
        ([({"group": "2"}, None)], "knob group cannot be '2'"),
        ([({"group": 2}, 32)], "bounds must ascend"),
        ([({"group": 2}, 64), ({"group": 8}, 32), ({}, None)], "bounds must ascend"),
    ],
)
def test_a_setting_that_does_not_exist_is_an_error(tmp_path, log, variants, message):
    log.append(TASK, [result(*variants)])
    with pytest.raises(
        TuningLogError, match=rf"linear_8_8\.jsonl names a setting that this kernel does not have: .*{message}"
    ):
        applied([SPEC], "cpu", tmp_path)


@pytest.mark.parametrize(
    "variants",
    [
        [{"setting": {"group": 2}}],
        [{"max_rows": None}],
        ["group"],
        [{"setting": 2, "max_rows": None}],
        [{"setting": {}, "max_rows": "32"}],
        [{"setting": {}, "max_rows": None, "more": 1}],
        {"setting": {"group": 2}, "max_rows": None},
    ],
)
def test_a_result_of_another_shape_is_an_error(tmp_path, log, variants):
    """Its checksum is right, but no tuner wrote it."""
    log.append(TASK, [replace(BETTER, variants=variants)])
    with pytest.raises(
        TuningLogError, match=r"line 2 of the tuning log .*linear_8_8\.jsonl is damaged or not a tuner's"
    ):
        applied([SPEC], "cpu", tmp_path)


def test_the_logs_that_come_with_turbo_tvm():
    """They are whole: a damaged one would stop every compile for its target."""
    assert SHIPPED.is_dir()
    for path in sorted(SHIPPED.glob("*/*.jsonl")):
        assert list(read_records(path))
