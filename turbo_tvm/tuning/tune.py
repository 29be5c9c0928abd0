"""`turbo_tvm.tune`: finds the best settings of a model's kernels on a machine, and keeps them in logs."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from turbo_tvm import config
from turbo_tvm.artifact import file as artifact
from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler import targets
from turbo_tvm.compiler.tuning_log import TuningLog
from turbo_tvm.errors import ArtifactError, TuningError
from turbo_tvm.runtime.device.cpu_features import check_host, cpu_name
from turbo_tvm.runtime.model import CompiledModel
from turbo_tvm.tuning.candidate import Remote
from turbo_tvm.tuning.search import SEARCHES
from turbo_tvm.tuning.tasks import USUAL_LENGTHS, Bucket, TuningTask, buckets, tasks_of
from turbo_tvm.tuning.tuner import KernelOutcome, Plan, Progress, Tuner

DEFAULT_TRIALS = 64


@dataclass(frozen=True)
class TuningReport:
    """What tuning found."""

    target: str
    logs: Path  # the directory that keeps it
    kernels: tuple[KernelOutcome, ...]  # in the order in which they were tuned


def tune(
    model: Any,
    *,
    target: str | None = None,
    precision: str = "fp32",
    trials: int = DEFAULT_TRIALS,
    lengths: Sequence[int] | None = None,
    logs: str | PathLike[str] = "tuning_logs",
    kernels: Sequence[str] = (),
    search: str = "xgb",
    tracker: str | None = None,
    key: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    timeout_s: float = 60.0,
    show: Callable[[Progress], None] | None = None,
) -> TuningReport:
    """Tune the kernels of a model; `compile(..., logs=...)` then builds it with what was found.

    model: the path of an artifact, a CompiledModel, or anything that `compile` takes.
    target, precision: as for `compile`; an artifact brings its own.
    trials: settings to try per kernel, those in the logs included.
    lengths: requests' lengths in tokens, as a sample of what is expected: they decide which batches are measured, and
        how much each counts.
    logs: the directory of the logs. It is read, continued and added to; several processes may use it at once.
    kernels: tune only those whose names contain one of these.
    search: "xgb", guided by XGBoost; or "random".
    tracker, key: "host:port" of a TVM RPC tracker and the key of the machine behind it to measure on; by default this
        machine. The code is built here either way.
    threads: of a kernel while it is measured; by default one per physical core of this machine.
    timeout_s: for building or measuring one candidate.
    show: called with a `Progress` after every round.

    Every candidate is checked against the default kernel before both are timed in turn. KeyboardInterrupt keeps all
    that was measured, and the next call goes on from there. The search is deterministic under a seed, but for timings.
    Method: the search of AutoTVM (Chen et al., arXiv 1805.08166) over declared knobs.

    Raises TuningError, and what `compile` raises.
    """
    if trials < 1:
        raise TuningError(f"at least one trial is needed, not {trials}")
    if search not in SEARCHES:
        raise TuningError(f"unknown search {search!r}: use one of {', '.join(SEARCHES)}")
    it = job(model, target, precision, lengths, logs, kernels, tracker, key, seed)
    plan = Plan(
        target=it.target,
        trials=trials,
        buckets=it.buckets,
        search=search,
        seed=seed,
        threads=config.num_threads(threads),
        timeout_s=timeout_s,
        remote=it.remote,
        machine=f"{key} behind a tracker" if it.remote else _machine(),
    )
    outcomes = Tuner(it.tasks, plan, it.log, show).run()
    return TuningReport(it.target, it.log.directory, tuple(outcomes))


@dataclass(frozen=True)
class Job:
    """What to tune."""

    target: str
    tasks: tuple[TuningTask, ...]
    buckets: tuple[Bucket, ...]  # the batches to measure in
    log: TuningLog
    remote: Remote | None  # the machine to measure on; None for this one


def job(
    model: Any,
    target: str | None = None,
    precision: str = "fp32",
    lengths: Sequence[int] | None = None,
    logs: str | PathLike[str] = "tuning_logs",
    kernels: Sequence[str] = (),
    tracker: str | None = None,
    key: str | None = None,
    seed: int = 0,
) -> Job:
    """Return the job that these arguments of `tune` describe. Raises TuningError where it cannot be done."""
    _check_packages()
    remote = _remote(tracker, key)
    specs, name, max_length = _kernels_of(model, target, precision)
    if remote is None:
        _check_here(name)
    found = buckets(lengths or USUAL_LENGTHS, max_length, seed)
    return Job(name, tuple(tasks_of(specs, kernels)), found, TuningLog(Path(logs), targets.log_name(name)), remote)


def _kernels_of(model: Any, target: str | None, precision: str) -> tuple[Sequence[KernelSpec], str, int]:
    """Return the kernels, the name of their target and the longest sequence."""
    if isinstance(model, str | PathLike) and Path(model).is_file() and Path(model).suffix != ".onnx":
        model = artifact.read(model)
    if isinstance(model, CompiledModel | artifact.Artifact):
        manifest = model.manifest
        if target is not None and target != manifest.target.name:
            raise TuningError(
                f"the artifact was compiled for {manifest.target.name!r}, not for {target!r}: leave target out"
            )
        return manifest.kernels, manifest.target.name, manifest.request_limits.max_length
    from turbo_tvm.compiler.compile import kernels_of

    name = target or "cpu"
    specs, max_length = kernels_of(model, name, precision)
    return specs, name, max_length


def _check_packages() -> None:
    for package in ("xgboost", "cloudpickle", "psutil", "tornado"):
        if importlib.util.find_spec(package) is None:
            raise TuningError(f"tuning needs {package}: pip install 'turbo-tvm[tune]'")


def _remote(tracker: str | None, key: str | None) -> Remote | None:
    if (tracker is None) != (key is None):
        raise TuningError("a machine behind a tracker needs both: tracker='host:port' and the key that its server gave")
    if tracker is None or key is None:
        return None
    host, _, port = tracker.rpartition(":")
    if not host or not port.isdecimal():
        raise TuningError(f"tracker {tracker!r} is not 'host:port', such as '10.0.0.5:9190'")
    return Remote(host, int(port), key)


def _check_here(name: str) -> None:
    """Raise TuningError unless this machine can run the target's code."""
    if targets.architectures(name):
        raise TuningError(
            f"kernels for {name} are measured on a GPU: start a server there and name its tracker and key"
        )
    try:
        check_host(targets.describe(name, targets.resolve(name)))
    except ArtifactError as error:
        raise TuningError(
            f"this machine cannot run code for {name!r}: measure on one that can, with tracker and key ({error})"
        ) from None


def _machine() -> str:
    return f"{cpu_name()}, {config.physical_cores()} cores, {platform.system()} {platform.release()}"
