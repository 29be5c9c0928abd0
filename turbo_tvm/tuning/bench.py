"""The bench: builds candidates, measures them in turn with the default, here or on a remote machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from turbo_tvm.compiler.tuning_log import TrialRecord
from turbo_tvm.errors import TuningError, WrongAnswersError
from turbo_tvm.schedules.common.space import Variant
from turbo_tvm.tuning import candidate, search
from turbo_tvm.tuning.candidate import Effort, Remote
from turbo_tvm.tuning.tasks import Bucket, TuningTask
from turbo_tvm.tuning.workers import Workers

FINAL_SECONDS = 0.5  # per bucket and finalist, all rounds together
FINAL_ROUNDS = 3  # over all finalists: a machine that changes its speed for seconds favours none in most of them
TRIAL_SECONDS = 0.15  # per bucket

_RECONNECT_TIMEOUT_S = 600.0  # to wait for a remote machine that went away
_RETRY_S = 2.0

Samples = Mapping[int, Sequence[Sequence[float]]]  # pairs of seconds, by the rows of the bucket


@dataclass(frozen=True)
class Plan:
    """How to tune."""

    target: str  # as for `compile`
    trials: int  # per kernel
    buckets: tuple[Bucket, ...]  # the batches to measure in
    search: str = "xgb"
    seed: int = 0
    threads: int = 1  # of a kernel while it is measured
    timeout_s: float = 60.0  # for building or measuring one candidate
    remote: Remote | None = None  # the machine to measure on; None for this one
    machine: str = ""  # its name in the log

    @property
    def tried(self) -> tuple[Bucket, ...]:
        """The buckets that trials are measured in; the final uses all."""
        return tuple(b for b in self.buckets if b.weight)

    @property
    def weights(self) -> dict[int, float]:
        """The weights of the buckets, by the rows they are measured at."""
        return {b.rows: b.weight for b in self.tried}


class Bench:
    """Builds candidates, several at a time, and measures them one after the other."""

    def __init__(self, directory: Path, plan: Plan, builders: Workers, runner: Workers, note: Callable[[str], None]):
        self._directory, self._plan, self._builders, self._runner, self._note = directory, plan, builders, runner, note
        self._built = 0
        self._defaults: dict[str, str] = {}

    def trials(self, task: TuningTask, settings: Sequence[Mapping[str, int]]) -> Iterator[TrialRecord]:
        """Yield a record per setting, also of one that failed, as soon as it is measured."""
        timed = self._timed(task, self._build_settings(task, settings), self._plan.tried, TRIAL_SECONDS)
        for setting, seconds in zip(settings, timed, strict=True):
            yield self._record(setting, seconds)

    def final(
        self, task: TuningTask, settings: Sequence[Mapping[str, int]], buckets: Sequence[Bucket]
    ) -> list[Samples]:
        """Return for each setting the samples of all rounds, by the rows of the bucket; none for one that failed."""
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
        """Yield for each library its samples by the rows of the bucket, or the TuningError why there are none.

        paths: of the libraries, or the TuningErrors of those that were not built.
        """
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
        """Build libraries and return their paths, or TuningErrors. Names differ, because a process loads each once."""
        text, jobs = task.recipe.to_json(), []
        for each in variants:
            self._built += 1
            jobs.append((text, each, self._plan.target, str(self._directory / f"candidate_{self._built}.so")))
        results = self._builders.run(candidate.build, jobs)
        return [job[-1] if result is None else result for job, result in zip(jobs, results, strict=True)]

    def _measure(self, task: TuningTask, default: str, path: str, batches: Sequence[Any], seconds: float) -> Any:
        result = self._once(task, default, path, batches, seconds)
        if self._plan.remote is None or not isinstance(result, TuningError) or isinstance(result, WrongAnswersError):
            return result
        self._wait(task, default)  # was it the machine that failed?
        return self._once(task, default, path, batches, seconds)

    def _once(self, task: TuningTask, default: str, path: str, batches: Sequence[Any], seconds: float) -> Any:
        effort = Effort(seconds, self._plan.threads, self._plan.seed)
        job = (task.recipe.to_json(), default, path, batches, effort, self._plan.remote)
        return self._runner.run(candidate.measure, [job])[0]

    def _wait(self, task: TuningTask, default: str) -> None:
        """Wait until the remote machine can measure the default. Raises TuningError after `_RECONNECT_TIMEOUT_S`."""
        started = time.monotonic()
        while True:
            result = self._once(task, default, default, [self._plan.buckets[0].lengths], 0.0)
            if not isinstance(result, TuningError):
                return
            remote = self._plan.remote
            assert remote is not None
            where = f"{remote.key!r} behind the tracker {remote.host}:{remote.port}"
            if time.monotonic() - started > _RECONNECT_TIMEOUT_S:
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


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _joined(rounds: Sequence[Samples]) -> dict[int, list[Sequence[float]]]:
    """Return the samples of all rounds together."""
    return {rows: [pair for one in rounds for pair in one[rows]] for rows in rounds[0]}
