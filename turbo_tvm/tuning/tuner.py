"""The tuner: tries settings of every kernel in rounds of a few candidates and keeps each trial once it is measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm

from turbo_tvm.compiler import targets
from turbo_tvm.compiler.tuning_log import KernelLog, ResultRecord, TaskRecord, TrialRecord, TuningLog
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.tuning import candidate, choose, search
from turbo_tvm.tuning.bench import Bench, Plan, now
from turbo_tvm.tuning.search import Observation, propose
from turbo_tvm.tuning.tasks import Bucket, TuningTask
from turbo_tvm.tuning.workers import Workers

ROUND = 8  # candidates that are built together
_BUILDERS = 2  # processes


@dataclass(frozen=True)
class KernelOutcome:
    """What tuning a kernel found."""

    kernel: str
    gains: dict[int, float]  # of the chosen variants, by the rows of the bucket
    mean_gain: float
    variants: tuple[Variant, ...]
    trials: int  # in the log
    failed: int  # of them
    added: int  # by this run


@dataclass
class Progress:
    """The state of tuning, for display."""

    kernel: str = ""  # being tuned
    number: int = 0  # of that kernel, from 1
    kernels: int = 0
    done: int = 0  # trials of that kernel
    trials: int = 0  # planned per kernel
    best: float = 1.0  # mean gain of the best setting so far
    gflops: float = 0.0  # GFLOP/s of the best setting so far in the largest batch
    seconds_left: float | None = None
    note: str = ""  # what is going on beside trials
    finished: list[KernelOutcome] = field(default_factory=list)


Show = Callable[[Progress], None]


class Tuner:
    """Tunes kernels and keeps what it measures in a log. show: called with the `Progress` as it goes."""

    def __init__(self, tasks: Sequence[TuningTask], plan: Plan, log: TuningLog, show: Show | None = None):
        self.tasks, self.plan, self.log = list(tasks), plan, log
        self._show = show or (lambda _: None)
        self._progress = Progress(kernels=len(self.tasks))
        self._started, self._measured = time.monotonic(), 0

    def run(self) -> list[KernelOutcome]:
        """Tune every kernel. KeyboardInterrupt leaves the log whole: the next run goes on from there."""
        with (
            tempfile.TemporaryDirectory(prefix="turbo_tvm_tune_") as directory,
            Workers(_BUILDERS, self.plan.timeout_s) as builders,
            Workers(1, self.plan.timeout_s) as runner,
        ):
            self._machine = Bench(Path(directory), self.plan, builders, runner, self._note)
            for number, task in enumerate(self.tasks, 1):
                self._progress.kernel, self._progress.number = task.kernel, number
                self._progress.finished.append(self._tune(task))
                self._show(self._progress)
        return self._progress.finished

    def _tune(self, task: TuningTask) -> KernelOutcome:
        record = task_record(task, self.plan.target)
        known = self.log.read(record)
        begun = len(known.trials)
        self._tell(task, known)
        while len(known.trials) < self.plan.trials:
            settings = self._propose(task, known)
            if not settings:
                break
            for trial in self._machine.trials(task, settings):
                self.log.append(record, [trial])
                self._measured += 1
            known = self.log.read(record)  # with those of another tuner on the same logs
            self._tell(task, known)
        if known.result is None or known.result.trials < len(known.trials):
            self.log.append(record, [self._decide(task, known)])
            known = self.log.read(record)
        return outcome(task, known, len(known.trials) - begun)

    def _propose(self, task: TuningTask, known: KernelLog) -> list[dict[str, int]]:
        count = min(ROUND, self.plan.trials - len(known.trials))
        options: dict[str, Any] = {"search": self.plan.search, "seed": self.plan.seed}
        return propose(task.space, observations(known.trials), self.plan.weights, count, **options)

    def _decide(self, task: TuningTask, known: KernelLog) -> ResultRecord:
        """Time the best few again, in the final, and return the variants of the kernel that follow."""
        self._note("timing the best again")
        settings = choose.finalists(observations(known.trials), self.plan.weights)
        timed = self._machine.final(task, settings, self.plan.buckets) if settings else []
        final = [
            Observation(setting, candidate.gains(seconds))
            for setting, seconds in zip(settings, timed, strict=True)
            if seconds
        ]
        bounds = {b.rows: b.max_rows for b in self.plan.buckets}
        if task.recipe.device == "cuda":
            chosen, gains = choose.one_for_all(final, bounds, self.plan.weights)
        else:
            chosen, gains = choose.variants(final, bounds)
        samples = {search.key(setting): seconds for setting, seconds in zip(settings, timed, strict=True)}
        return ResultRecord(
            variants=[{"setting": c.setting, "max_rows": c.max_rows} for c in chosen],
            gains=_rounded(gains),
            seconds=_samples_of(chosen, bounds, samples),
            lengths={str(b.rows): list(b.lengths) for b in self.plan.buckets},
            weights={str(b.rows): round(b.weight, 4) for b in self.plan.buckets},
            trials=len(known.trials),
            search=self.plan.search,
            seed=self.plan.seed,
            machine=self.plan.machine,
            threads=self.plan.threads,
            time=now(),
            finals=[{"setting": dict(o.setting), "gains": _rounded(o.gains)} for o in final],
        )

    def _tell(self, task: TuningTask, known: KernelLog) -> None:
        p, largest = self._progress, self.plan.tried[-1]
        p.done, p.trials = len(known.trials), self.plan.trials
        rates = [_rate(task, largest, trial) for trial in known.trials if trial.seconds.get(str(largest.rows))]
        p.gflops = max(rates, default=0.0)
        whole = [o.gains for o in observations(known.trials) if set(o.gains) >= set(self.plan.weights)]
        p.best = max([1.0, *(choose.mean_gain(gains, self.plan.weights) for gains in whole)])
        p.note = ""
        if self._measured:
            per_trial = (time.monotonic() - self._started) / self._measured
            left = self.plan.trials - p.done + (p.kernels - p.number) * self.plan.trials
            p.seconds_left = per_trial * max(left, 0)
        self._show(p)

    def _note(self, text: str) -> None:
        self._progress.note = text
        self._show(self._progress)


def task_record(task: TuningTask, target: str) -> TaskRecord:
    """Return the record of what a kernel's measurements hold for: its recipe, target and TVM."""
    return TaskRecord(
        task.kernel, task.recipe.to_json(), task.recipe.version, targets.log_name(target), tvm.__version__
    )


def observations(trials: Sequence[TrialRecord]) -> list[Observation]:
    """Return trials in the form that the search learns from."""
    return [Observation(t.setting, candidate.gains({int(r): pairs for r, pairs in t.seconds.items()})) for t in trials]


def outcome(task: TuningTask, known: KernelLog, added: int) -> KernelOutcome:
    """Return what a log has on a kernel that has been tuned. added: trials of this run."""
    result = known.result
    assert result is not None
    gains = {int(rows): gain for rows, gain in result.gains.items()}
    weights = {int(rows): weight for rows, weight in result.weights.items() if weight}
    failed = sum(bool(trial.error) for trial in known.trials)
    mean = choose.mean_gain(gains, weights)
    return KernelOutcome(task.kernel, gains, mean, result.as_variants(), len(known.trials), failed, added)


def _samples_of(
    chosen: Sequence[choose.Choice], bounds: Mapping[int, int | None], samples: Mapping[tuple, Any]
) -> dict[str, list[list[float]]]:
    """Return the final's samples of the setting that each bucket uses; none where that is the default."""
    found = {}
    for rows, bound in bounds.items():
        choice = next(c for c in chosen if c.max_rows is None or (bound is not None and bound <= c.max_rows))
        if choice.setting:
            found[str(rows)] = samples[search.key(choice.setting)][rows]
    return found


def _rounded(gains: Mapping[int, float]) -> dict[str, float]:
    return {str(rows): round(gain, 4) for rows, gain in gains.items()}


def _rate(task: TuningTask, bucket: Bucket, trial: TrialRecord) -> float:
    pairs = trial.seconds[str(bucket.rows)]
    return task.flops(bucket.lengths) / min(b for _, b in pairs) / 1e9
