"""Tune: every kernel of a model in turn, in rounds of a few candidates, each trial kept as soon as it is measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tvm

from turbo_tvm.compiler import targets
from turbo_tvm.compiler.tuning_log import KernelLog, ResultRecord, TaskRecord, TrialRecord, TuningLog
from turbo_tvm.errors import TuningError
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.tuning import candidate, choose, search
from turbo_tvm.tuning.candidate import Effort, Remote
from turbo_tvm.tuning.search import Observation, propose
from turbo_tvm.tuning.tasks import Bucket, TuningTask
from turbo_tvm.tuning.workers import Workers

ROUND = 8  # candidates that are built together
FINAL_SECONDS = 0.5  # per bucket and finalist, all rounds together
FINAL_ROUNDS = 3  # over all finalists: a machine that changes its speed for seconds favours nobody in most of them
TRIAL_SECONDS = 0.15

_BUILDERS = 2
_PATIENCE_S = 600.0  # for a machine that went away
_RETRY_S = 2.0


@dataclass(frozen=True)
class Plan:
    """What was asked: trials per kernel, in which batches, by which search, where.

    target: as for `compile`; threads: of a kernel; timeout_s: for building or measuring one candidate.
    """

    target: str
    trials: int
    buckets: tuple[Bucket, ...]
    search: str = "xgb"
    seed: int = 0
    threads: int = 1
    timeout_s: float = 60.0
    remote: Remote | None = None
    machine: str = ""

    @property
    def tried(self) -> tuple[Bucket, ...]:
        """The buckets that trials are measured in; the final knows all."""
        return tuple(b for b in self.buckets if b.weight)

    @property
    def weights(self) -> dict[int, float]:
        """Of the buckets, by the rows they are measured at."""
        return {b.rows: b.weight for b in self.tried}


@dataclass(frozen=True)
class KernelOutcome:
    """gains: of what was chosen, by the rows of the bucket; added: trials of this run."""

    kernel: str
    gains: dict[int, float]
    mean_gain: float
    variants: tuple[Variant, ...]
    trials: int
    failed: int
    added: int


@dataclass
class Progress:
    """What is known while tuning. gflops: of the best setting so far in the largest batch."""

    kernel: str = ""
    number: int = 0
    kernels: int = 0
    done: int = 0
    trials: int = 0
    best: float = 1.0
    gflops: float = 0.0
    seconds_left: float | None = None
    note: str = ""
    finished: list[KernelOutcome] = field(default_factory=list)


Show = Callable[[Progress], None]
Samples = Mapping[int, Sequence[Sequence[float]]]  # pairs of seconds, by the rows of the bucket


class Tuner:
    """Tunes kernels and keeps what it measures in a log. `show` is called as it goes."""

    def __init__(self, tasks: Sequence[TuningTask], plan: Plan, log: TuningLog, show: Show | None = None):
        self.tasks, self.plan, self.log = list(tasks), plan, log
        self._show = show or (lambda _: None)
        self._progress = Progress(kernels=len(self.tasks))
        self._started, self._measured = time.monotonic(), 0

    def run(self) -> list[KernelOutcome]:
        """Every kernel. KeyboardInterrupt leaves the log whole: the next run goes on from there."""
        with (
            tempfile.TemporaryDirectory(prefix="turbo_tvm_tune_") as directory,
            Workers(_BUILDERS, self.plan.timeout_s) as builders,
            Workers(1, self.plan.timeout_s) as runner,
        ):
            self._machine = _Bench(Path(directory), self.plan, builders, runner, self._note)
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
        """The final: the best few once more, and the variants of a kernel that follow."""
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


class _Bench:
    """Builds candidates on the cores that are free and measures them one after the other."""

    def __init__(self, directory: Path, plan: Plan, builders: Workers, runner: Workers, note: Callable[[str], None]):
        self._directory, self._plan, self._builders, self._runner, self._note = directory, plan, builders, runner, note
        self._built = 0
        self._defaults: dict[str, str] = {}

    def trials(self, task: TuningTask, settings: Sequence[Mapping[str, int]]) -> Iterator[TrialRecord]:
        """A record per setting, whatever became of it, as soon as it is measured."""
        timed = self._timed(task, self._build_settings(task, settings), self._plan.tried, TRIAL_SECONDS)
        for setting, seconds in zip(settings, timed, strict=True):
            yield self._record(setting, seconds)

    def final(
        self, task: TuningTask, settings: Sequence[Mapping[str, int]], buckets: Sequence[Bucket]
    ) -> list[Samples]:
        """For each setting the samples of all rounds, by the rows of the bucket; none for one that failed."""
        paths = self._build_settings(task, settings)
        found: list[list[Samples]] = [[] for _ in paths]
        failed: set[int] = set()
        for _ in range(FINAL_ROUNDS):
            rounds = self._timed(task, paths, buckets, FINAL_SECONDS / FINAL_ROUNDS)
            for i, seconds in enumerate(rounds):
                if isinstance(seconds, TuningError):
                    failed.add(i)
                else:
                    found[i].append(seconds)
        return [{} if i in failed else _joined(rounds) for i, rounds in enumerate(found)]

    def _timed(
        self, task: TuningTask, paths: Sequence[Any], buckets: Sequence[Bucket], seconds: float
    ) -> Iterator[Any]:
        """Of each library the samples by the rows of the bucket, or the TuningError; one that was not built is it."""
        default, batches = self._default(task), [b.lengths for b in buckets]
        for path in paths:
            failed = isinstance(path, TuningError)
            yield path if failed else self._measure(task, default, path, batches, seconds)

    def _build_settings(self, task: TuningTask, settings: Sequence[Mapping[str, int]]) -> list[Any]:
        return self._build(task, [(Variant(search.key(setting)),) for setting in settings])

    def _default(self, task: TuningTask) -> str:
        if task.kernel not in self._defaults:
            (path,) = self._build(task, [()])
            if isinstance(path, TuningError):
                raise TuningError(f"the kernel {task.kernel} cannot be built: {path}")
            self._defaults[task.kernel] = path
        return self._defaults[task.kernel]

    def _build(self, task: TuningTask, variants: Sequence[tuple[Variant, ...]]) -> list[Any]:
        """The libraries' paths; each has a name of its own, because a process loads a name once."""
        text, jobs = task.recipe.to_json(), []
        for each in variants:
            self._built += 1
            jobs.append((text, each, self._plan.target, str(self._directory / f"candidate_{self._built}.so")))
        results = self._builders.run(candidate.build, jobs)
        return [job[-1] if result is None else result for job, result in zip(jobs, results, strict=True)]

    def _measure(self, task: TuningTask, default: str, path: str, batches: Sequence[Any], seconds: float) -> Any:
        result = self._once(task, default, path, batches, seconds)
        if self._plan.remote is None or not isinstance(result, TuningError) or "wrong answers" in str(result):
            return result
        self._wait(task, default)  # was it the machine that failed?
        return self._once(task, default, path, batches, seconds)

    def _once(self, task: TuningTask, default: str, path: str, batches: Sequence[Any], seconds: float) -> Any:
        effort = Effort(seconds, self._plan.threads, self._plan.seed)
        job = (task.recipe.to_json(), default, path, batches, effort, self._plan.remote)
        return self._runner.run(candidate.measure, [job])[0]

    def _wait(self, task: TuningTask, default: str) -> None:
        """Until the default can be measured there. TuningError if that takes too long."""
        started = time.monotonic()
        while True:
            result = self._once(task, default, default, [self._plan.buckets[0].lengths], 0.0)
            if not isinstance(result, TuningError):
                return
            remote = self._plan.remote
            assert remote is not None
            where = f"{remote.key!r} behind the tracker {remote.host}:{remote.port}"
            if time.monotonic() - started > _PATIENCE_S:
                raise TuningError(
                    f"no machine {where} answers ({result}); what was measured is kept: start it, and tune again"
                )
            self._note(f"waiting for {where}")
            self._runner.restart()
            time.sleep(_RETRY_S)

    def _record(self, setting: Mapping[str, int], seconds: Any) -> TrialRecord:
        failed = isinstance(seconds, TuningError)
        return TrialRecord(
            setting=dict(setting),
            search=self._plan.search,
            seed=self._plan.seed,
            seconds={} if failed else {str(rows): pairs for rows, pairs in seconds.items()},
            error=str(seconds) if failed else "",
            machine=self._plan.machine,
            threads=self._plan.threads,
            time=now(),
        )


def task_record(task: TuningTask, target: str) -> TaskRecord:
    """What a kernel's measurements hold for."""
    return TaskRecord(
        task.kernel, task.recipe.to_json(), task.recipe.version, targets.log_name(target), tvm.__version__
    )


def observations(trials: Sequence[TrialRecord]) -> list[Observation]:
    """What the search learns from."""
    return [Observation(t.setting, candidate.gains({int(r): pairs for r, pairs in t.seconds.items()})) for t in trials]


def outcome(task: TuningTask, known: KernelLog, added: int) -> KernelOutcome:
    """What a log says of a kernel that has been tuned."""
    result = known.result
    assert result is not None
    gains = {int(rows): gain for rows, gain in result.gains.items()}
    weights = {int(rows): weight for rows, weight in result.weights.items() if weight}
    failed = sum(bool(trial.error) for trial in known.trials)
    mean = choose.mean_gain(gains, weights)
    return KernelOutcome(task.kernel, gains, mean, result.as_variants(), len(known.trials), failed, added)


def now() -> str:
    """To the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _samples_of(
    chosen: Sequence[choose.Choice], bounds: Mapping[int, int | None], samples: Mapping[tuple, Any]
) -> dict[str, list[list[float]]]:
    """The final's samples of what is used in each bucket; none where that is the default."""
    found = {}
    for rows, bound in bounds.items():
        choice = next(c for c in chosen if c.max_rows is None or (bound is not None and bound <= c.max_rows))
        if choice.setting:
            found[str(rows)] = samples[search.key(choice.setting)][rows]
    return found


def _joined(rounds: Sequence[Samples]) -> dict[int, list[Sequence[float]]]:
    """The samples of all rounds together."""
    return {rows: [pair for one in rounds for pair in one[rows]] for rows in rounds[0]}


def _rounded(gains: Mapping[int, float]) -> dict[str, float]:
    return {str(rows): round(gain, 4) for rows, gain in gains.items()}


def _rate(task: TuningTask, bucket: Bucket, trial: TrialRecord) -> float:
    pairs = trial.seconds[str(bucket.rows)]
    return task.flops(bucket.lengths) / min(b for _, b in pairs) / 1e9
