"""The report of a tuning log: the default of every kernel beside the tuned one, and the progress of the searches."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_tvm.compiler.tuning_log import KernelLog, TuningLog
from turbo_tvm.errors import TuningError
from turbo_tvm.profiling.roofline import Bound, MachineLimits, Work, floor
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.tuning import candidate
from turbo_tvm.tuning.candidate import Effort, Remote
from turbo_tvm.tuning.choose import mean_gain
from turbo_tvm.tuning.tasks import Bucket, TuningTask
from turbo_tvm.tuning.tuner import observations, task_record
from turbo_tvm.tuning.workers import Workers

SECONDS = 1.0  # per kernel and bucket
AT_THE_LIMIT = 0.97  # a kernel that reaches this part of the machine's limit has nothing left to gain but noise


@dataclass(frozen=True)
class BucketReport:
    """A kernel on one batch."""

    kernel: str
    lengths: tuple[int, ...]  # of the batch's sequences
    flops: float  # of one call
    pairs: tuple[tuple[float, float], ...]  # seconds of default and tuned, timed in turn
    floor_s: float | None  # the least time that the machine's limits allow; None if they are unknown
    bound: Bound | None  # which limit that is
    setting: dict[str, int]  # the tuned setting; {} where the default was best

    @property
    def gain(self) -> float:
        """The default's time divided by the tuned kernel's, as `candidate.gains` measures it."""
        return candidate.gains({0: self.pairs})[0]

    @property
    def at_the_limit(self) -> bool:
        """Whether the default itself takes at most 3 % more than the machine's limit allows."""
        return self.floor_s is not None and self.floor_s >= AT_THE_LIMIT * self.default_s

    @property
    def default_s(self) -> float:
        """The default's best time, which other programs disturbed least."""
        return min(a for a, _ in self.pairs)

    @property
    def tuned_s(self) -> float:
        """The tuned kernel's best time."""
        return min(b for _, b in self.pairs)


@dataclass(frozen=True)
class Curve:
    """A search on one kernel: the best mean gain over the default after each of its trials."""

    kernel: str
    search: str
    best: tuple[float, ...]


def compare(
    tasks: Sequence[TuningTask],
    log: TuningLog,
    target: str,
    threads: int,
    buckets: Sequence[Bucket],
    *,
    limits: MachineLimits | None = None,
    remote: Remote | None = None,
    show: Callable[[str], None] = lambda _: None,
) -> list[BucketReport]:
    """Build every kernel as default and as tuned, and time both in turn, on this machine or another.

    Raises TuningError where the log has no result for any of the kernels.
    """
    known = {task.kernel: log.read(task_record(task, target)) for task in tasks}
    tuned = [task for task in tasks if known[task.kernel].result is not None]
    if not tuned:
        raise TuningError(f"there is no result for these kernels in {log.directory}: tune them first")
    found: list[BucketReport] = []
    footprint = sum(task.calls * task.bytes_weights for task in tasks)
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_report_") as directory, Workers(1, 300.0) as workers:
        for number, task in enumerate(tuned):
            show(f"{task.kernel} ({number + 1} of {len(tuned)})")
            ways: list[tuple[Variant, ...]] = [(), variants_of(known[task.kernel])]
            paths = [str(Path(directory) / f"{name}_{number}.so") for name in ("default", "tuned")]
            build(task, dict(zip(paths, ways, strict=True)), target, workers)
            effort = Effort(SECONDS, threads)
            seconds = in_turn(task, paths[0], paths[1], buckets, effort, workers, remote)
            for bucket in buckets:
                work = Work(
                    task.flops(bucket.lengths),
                    task.bytes_weights,
                    task.bytes(bucket.lengths) - task.bytes_weights,
                    footprint,
                )
                least, bound = floor(task.kernel, work, limits) if limits else (None, None)
                pairs = tuple((a, b) for a, b in seconds[bucket.rows])
                setting = _setting(known[task.kernel], bucket.rows)
                found.append(BucketReport(task.kernel, bucket.lengths, work.flops, pairs, least, bound, setting))
    return found


def curves(tasks: Sequence[TuningTask], log: TuningLog, target: str) -> list[Curve]:
    """Return the curve of each search in the log, kernel by kernel."""
    made = []
    for task in tasks:
        known = log.read(task_record(task, target))
        weights = {int(r): w for r, w in known.result.weights.items() if w} if known.result else {}
        for name in dict.fromkeys(trial.search for trial in known.trials):
            seen = observations([trial for trial in known.trials if trial.search == name])
            gains = [mean_gain(o.gains, weights) if weights and set(o.gains) >= set(weights) else 0.0 for o in seen]
            made.append(Curve(task.kernel, name, _best_so_far(gains)))
    return made


def mean_curve(found: Sequence[Curve], search: str) -> tuple[float, ...]:
    """Return the geometric mean of a search's curves over the kernels, as far as the shortest goes."""
    mine = [curve.best for curve in found if curve.search == search]
    return tuple(math.exp(statistics.fmean(map(math.log, best))) for best in zip(*mine, strict=False))


def geometric_mean(found: Sequence[BucketReport], weights: Mapping[int, float]) -> float:
    """Return the weighted geometric mean of the gains over all kernels and buckets."""
    total = sum(weights[sum(one.lengths)] for one in found)
    return math.exp(sum(weights[sum(one.lengths)] * math.log(one.gain) for one in found) / total)


def build(task: TuningTask, ways: Mapping[str, tuple[Variant, ...]], target: str, workers: Workers) -> None:
    """Build a kernel in several ways, each into the library at its path. Raises TuningError."""
    text = task.recipe.to_json()
    _check(task, workers.run(candidate.build, [(text, variants, target, path) for path, variants in ways.items()]))


def in_turn(
    task: TuningTask,
    first: str,
    second: str,
    buckets: Sequence[Bucket],
    effort: Effort,
    workers: Workers,
    remote: Remote | None = None,
) -> dict[int, list[list[float]]]:
    """Time two libraries of a kernel in turn; return pairs of seconds by the rows of the bucket. Raises TuningError."""
    batches = [bucket.lengths for bucket in buckets]
    results = workers.run(candidate.measure, [(task.recipe.to_json(), first, second, batches, effort, remote)])
    _check(task, results)
    return results[0]


def variants_of(known: KernelLog) -> tuple[Variant, ...]:
    """Return the variants chosen for a kernel; none for the default. Raises TuningError before there is a result."""
    if known.result is None:
        raise TuningError("the kernel was not tuned to the end: tune it first")
    return known.result.as_variants()


def _check(task: TuningTask, results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, TuningError):
            raise TuningError(f"{task.kernel}: {result}")


def _setting(known: KernelLog, rows: int) -> dict[str, int]:
    for variant in variants_of(known):
        if variant.max_rows is None or rows <= variant.max_rows:
            return dict(variant.setting)
    return {}


def _best_so_far(gains: Sequence[float]) -> tuple[float, ...]:
    best, made = 1.0, []
    for gain in gains:
        best = max(best, gain)
        made.append(best)
    return tuple(made)
