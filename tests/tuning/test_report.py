"""How searches went and what was gained, from records that are made up; nothing is measured here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sized_operators as sized
import tvm

from turbo_tvm.compiler import targets
from turbo_tvm.compiler.kernel_recipe import KernelRecipe
from turbo_tvm.compiler.tuning_log import ResultRecord, TrialRecord, TuningLog
from turbo_tvm.errors import TuningError
from turbo_tvm.schedules.cpu import tiles
from turbo_tvm.tuning.report import BucketReport, Curve, curves, geometric_mean, mean_curve, variants_of
from turbo_tvm.tuning.tasks import TuningTask
from turbo_tvm.tuning.tuner import task_record

RECIPE = KernelRecipe.of(sized.linear(tiles.AVX2, 8, 8), tiles.AVX2)
TASK = TuningTask("linear_8_8", RECIPE, 1, 128.0, 0.0, 256, 64, RECIPE.space)
OTHER = replace(TASK, kernel="linear_8_9")
RESULT = ResultRecord([], {}, {}, {}, {"16": 0.5, "64": 0.5}, 4, "xgb", 0)


def trial(search, *gains):
    """A trial with gains in the buckets of 16 and 64 rows; none: it failed."""
    return TrialRecord({"group": 2}, search, 0, {r: [[g, 1.0]] for r, g in zip(("16", "64"), gains, strict=False)})


@pytest.fixture
def log(tmp_path):
    return TuningLog(tmp_path, targets.log_name("cpu"))


def test_a_curve_is_the_best_so_far(log):
    log.append(task_record(TASK, "cpu"), [trial("xgb", 0.5, 0.5), trial("xgb", 2.0, 0.5), trial("xgb", 4.0, 1.0)])
    log.append(task_record(TASK, "cpu"), [trial("xgb"), trial("xgb", 9.0), trial("xgb", 1.2, 1.2), RESULT])
    (curve,) = curves([TASK], log, "cpu")
    assert curve == Curve("linear_8_8", "xgb", pytest.approx((1.0, 1.0, 2.0, 2.0, 2.0, 2.0)))


def test_a_curve_for_each_search_and_kernel(log):
    log.append(task_record(TASK, "cpu"), [trial("xgb", 1.5, 1.5), trial("random", 1.1, 1.1), trial("xgb", 1.6, 1.6)])
    log.append(task_record(TASK, "cpu"), [RESULT])
    log.append(task_record(OTHER, "cpu"), [trial("random", 2.0, 2.0), RESULT])
    found = curves([TASK, OTHER], log, "cpu")
    assert [(curve.kernel, curve.search, curve.best) for curve in found] == [
        ("linear_8_8", "xgb", pytest.approx((1.5, 1.6))),
        ("linear_8_8", "random", pytest.approx((1.1,))),
        ("linear_8_9", "random", pytest.approx((2.0,))),
    ]


def test_kernels_without_trials_have_no_curve(log):
    assert curves([TASK], log, "cpu") == []
    log.append(replace(task_record(TASK, "cpu"), tvm=tvm.__version__ + ".other"), [trial("xgb", 2.0, 2.0), RESULT])
    assert curves([TASK], log, "cpu") == []


def test_without_a_result_nothing_is_gained_yet(log):
    """Which bucket weighs how much is not known before."""
    log.append(task_record(TASK, "cpu"), [trial("xgb", 2.0, 2.0)])
    assert curves([TASK], log, "cpu") == [Curve("linear_8_8", "xgb", (1.0,))]


def test_the_mean_curve_goes_as_far_as_the_shortest():
    found = [Curve("a", "xgb", (1.0, 2.0, 8.0)), Curve("b", "xgb", (1.0, 8.0)), Curve("c", "random", (3.0,))]
    assert mean_curve(found, "xgb") == pytest.approx((1.0, 4.0))
    assert mean_curve(found, "random") == pytest.approx((3.0,))
    assert mean_curve(found, "grid") == () == mean_curve([], "xgb")


def measured(lengths, *pairs):
    return BucketReport("linear_8_8", lengths, 1e6, pairs, None, None, {})


def test_what_a_bucket_gains_is_the_median_of_its_pairs():
    report = measured((16,), (1.0, 0.5), (1.2, 1.0), (3.0, 1.0), (1.0, 2.0), (1.5, 1.0))
    assert report.gain == 1.5
    assert report.default_s == 1.0 and report.tuned_s == 0.5


def test_the_gain_over_all_is_weighted_by_bucket():
    found = [measured((16,), (4.0, 1.0)), measured((30, 34), (1.0, 1.0)), measured((16,), (1.0, 1.0))]
    assert geometric_mean(found, {16: 1.0, 64: 1.0}) == pytest.approx(4 ** (1 / 3))
    assert geometric_mean(found, {16: 1.0, 64: 2.0}) == pytest.approx(4 ** (1 / 4))
    assert geometric_mean(found[:1], {16: 0.1}) == pytest.approx(4)


@pytest.mark.parametrize(("floor", "there"), [(None, False), (0.9, False), (0.98, True)])
def test_at_the_limit_is_within_3_percent_of_it(floor, there):
    pairs = ((1.2, 1.0), (1.0, 1.1))
    assert BucketReport("linear", (16,), 1.0, pairs, floor, "compute", {}).at_the_limit is there


def test_a_kernel_that_was_not_tuned_has_no_variants(log):
    with pytest.raises(TuningError, match="tune it first"):
        variants_of(log.read(task_record(TASK, "cpu")))
    log.append(task_record(TASK, "cpu"), [RESULT])
    assert variants_of(log.read(task_record(TASK, "cpu"))) == ()
