"""The engine under load: what rate each policy bears, what latency it gives, and whether the simulator knows it.

For every model, precision, range of lengths and layout, three steps. Saturation: the same requests, all at once, to an
engine of each policy, in rotating order; their rate bounds what the policy can bear. Trials: Poisson arrivals at rising
fractions of that rate; a policy's critical rate is the highest one at which latency stayed bounded. Simulation: the
trial's own arrivals through `runtime/simulator.py`, with the cost refined by all of its batches, and their scatter.

Padded: the same kernels on sequences that are filled up to the longest of their batch, as an engine that pads computes
them. Their answers mean nothing; what they cost does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from . import machine, models, pages
from .measure import rotated
from .results import raw_path, read_json

RANGES = {"2..100": (2, 100), "5..500": (5, 500)}
LAYOUTS = ("packed", "padded")
POLICIES = ("nobatch", "naive", "token_budget", "dp", "dp_latency", "deadline")
FRACTIONS = (0.5, 0.7, 0.8, 0.9, 1.2)
SATURATION_ROUNDS = 5
SATURATION_S = 6.0  # about what a round lasts for `nobatch`
LEAST_REQUESTS = 300  # of a trial
MAX_QUEUE = 1 << 20
IDLE_REQUESTS, IDLE_PAUSE_S = 300, 0.01


@dataclass(frozen=True)
class Settings:
    """What is asked. command: as it was typed; fractions: of what a policy bears when saturated, the rates
    of its trials; seconds, longest: least and most that a trial lasts.
    """

    command: str
    models: dict[str, dict[str, int]]
    precisions: tuple[str, ...]
    ranges: tuple[str, ...]
    layouts: tuple[str, ...]
    policies: tuple[str, ...]
    fractions: tuple[float, ...]
    seconds: float
    longest: float
    threads: int
    seed: int
    out: Path
    resume: bool


@dataclass(frozen=True)
class Load:
    """One row of the plan: what is served, and to which requests."""

    model: str
    precision: str
    lengths: str
    layout: str
    policies: tuple[str, ...]

    @property
    def name(self) -> str:
        """A key of the results."""
        return f"{self.model} {self.precision} {self.lengths} {self.layout}"


def plan(settings: Settings) -> list[Load]:
    """Every combination that is asked for."""
    return [
        Load(model, precision, lengths, layout, settings.policies)
        for model in settings.models
        for precision in settings.precisions
        for layout in settings.layouts
        for lengths in settings.ranges
    ]


def run(settings: Settings, console: Console) -> None:
    """Measure everything, and write the page after every load."""
    from . import serving_report

    report = _begin(settings, console)
    compiled: dict[tuple[str, str], Any] = {}
    for load in plan(settings):
        if load.name in report["loads"]:
            console.print(f"{load.name}: kept")
            continue
        key = load.model, load.precision
        if key not in compiled:
            compiled = {key: _compile(settings, *key, console)}  # one at a time: memory
            report["idle"][" ".join(key)] = idle_overhead(compiled[key], settings.seed)
        report["loads"][load.name] = measure_load(settings, load, compiled[key], report, console)
        pages.publish(serving_report.PAGE, report, settings.out / "serving.json", console)
    console.print(serving_report.overview(serving_report.summarized(report)))


def _begin(settings: Settings, console: Console) -> dict[str, Any]:
    """A report without loads, or with those that an earlier run left of the same machine and sources."""
    made: dict[str, Any] = {
        "format": "serving 1",
        "seed": settings.seed,
        "machine": machine.describe(settings.threads),
        "runs": [],
        "idle": {},
        "loads": {},
    }
    path = raw_path(settings.out / "serving.json")
    old = read_json(path) if settings.resume else None
    if old is not None:
        if all(old.get(key) == made[key] for key in ("format", "seed", "machine")):
            made = old
        else:
            console.print(f"{path} is of another machine, seed or version: begun anew")
    revision, started = machine.revision(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    made["runs"].append({"command": settings.command, "started": started, "revision": revision})
    return made


def _compile(settings: Settings, name: str, precision: str, console: Console) -> Any:
    import turbo_tvm

    console.print(f"compiling {name}, {precision}")
    module = models.build(settings.models[name], settings.seed)
    return turbo_tvm.compile(module, precision=precision, threads=settings.threads, name=name, progress=False)


def measure_load(
    settings: Settings, load: Load, compiled: Any, report: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Saturation, trials and their simulation for every policy."""
    from .padded_model import Padded  # which imports TVM

    model = compiled if load.layout == "packed" else Padded.of(compiled)
    spec = model.measure_cost()
    low, high = RANGES[load.lengths]
    cost: Any = model.cost
    mean_cost = sum(cost([n]) for n in range(low, high + 1)) / (high + 1 - low)
    console.print(f"{load.name}: one request takes {1e3 * mean_cost:.1f} ms, predicted within {spec.error:.1%}")
    count = max(96, int(SATURATION_S / mean_cost))
    rates = saturation(model, load, count, settings.seed)
    idle_s = median(report["idle"][f"{load.model} {load.precision}"])
    found: dict[str, Any] = {
        **asdict(load),
        "cost": asdict(spec),
        "saturation_requests": count,
        "saturation": rates,
        "overhead_s": idle_s,
        "trials": {policy: [] for policy in load.policies},
        "others_cpus": machine.cpus_used_by_others(),
    }
    for policy in load.policies:
        console.print(f"  {policy}: {median(rates[policy]):.1f} requests/s when saturated")
    for number, fraction in enumerate(settings.fractions):
        for policy in rotated(list(load.policies), number):
            rate = fraction * median(rates[policy])
            done = trial(model, load, policy, rate, settings, settings.seed + 1 + number, idle_s)
            found["trials"][policy].append({"fraction": fraction, **done})
            console.print(f"  {policy}: {describe(done)}")
    return found


def describe(done: dict[str, Any]) -> str:
    """A trial in a line."""
    latency = np.array(done["latency_s"]) * 1e3
    bounded = "bounded" if done["bounded"] else "NOT bounded"
    mean, p99 = latency.mean(), np.percentile(latency, 99)
    return (
        f"{done['rate']:.1f} requests/s: mean {mean:.0f} ms, p99 {p99:.0f} ms, {bounded}; "
        f"simulated mean {1e3 * done['simulated_mean_s']:.0f} ms, batches of {done['mean_batch']:.1f}"
    )


def saturation(model: Any, load: Load, count: int, seed: int) -> dict[str, list[float]]:
    """Requests per second by policy, a value per round."""
    from turbo_tvm.runtime.scheduling.arrivals import poisson, uniform

    lengths = poisson(1.0, count, uniform(*RANGES[load.lengths]), seed).lengths.tolist()
    requests = random_ids(lengths, model.manifest.request_limits.vocab_size, seed)
    rates: dict[str, list[float]] = {policy: [] for policy in load.policies}
    for number in range(SATURATION_ROUNDS):
        for policy in rotated(list(load.policies), number):
            with engine(model, policy) as serving:
                start = time.perf_counter()
                for future in [serving.submit(ids) for ids in requests]:
                    future.result()
                rates[policy].append(count / (time.perf_counter() - start))
    return rates


def trial(
    model: Any, load: Load, policy: str, rate: float, settings: Settings, seed: int, overhead_s: float
) -> dict[str, Any]:
    """Poisson arrivals at a rate: every latency, and what the simulator makes of the same arrivals."""
    from turbo_tvm.runtime.scheduling.arrivals import poisson, uniform
    from turbo_tvm.runtime.scheduling.cost_model import RefinedCost
    from turbo_tvm.runtime.scheduling.simulator import is_bounded, simulate

    seconds = min(settings.longest, max(settings.seconds, LEAST_REQUESTS / rate))
    trace = poisson(rate, max(20, int(rate * seconds)), uniform(*RANGES[load.lengths]), seed)
    requests = random_ids(trace.lengths.tolist(), model.manifest.request_limits.vocab_size, seed)
    with engine(model, policy) as serving:
        batches = watch(serving.cost)
        latency = answer_trace(serving, trace.arrival_s, requests)
        statistics, limits = serving.statistics, serving.limits
    measured = model.cost
    cost = RefinedCost.fitted(measured, batches)
    jitter = [seconds / cost(lengths) for lengths, seconds in batches]
    simulated = simulate(trace, cost, policy=policy, limits=limits, overhead_s=overhead_s, jitter=jitter, seed=seed)
    return {
        "rate": rate,
        "requests": len(trace),
        "latency_s": [round(x, 6) for x in latency.tolist()],
        "bounded": is_bounded(trace, latency),
        "batch_tokens": [sum(lengths) for lengths, _ in batches],
        "batch_s": [round(seconds, 6) for _, seconds in batches],
        "predicted_s": [round(measured(lengths), 6) for lengths, _ in batches],
        "answered_per_s": len(trace) / (float(trace.arrival_s[-1]) + float(latency[-1])),
        "mean_batch": statistics.batch_size.mean,
        "padding_waste": statistics.padding_waste,
        "simulated_mean_s": simulated.mean_s,
        "simulated_p99_s": simulated.percentile_s(99),
        "simulated_mean_batch": float(simulated.batch_sizes.mean()),
    }


def watch(cost: Any) -> list[tuple[list[int], float]]:
    """What the engine tells its cost about every batch: lengths, and seconds of the executor."""
    seen: list[tuple[list[int], float]] = []
    observe = cost.observe

    def noted(lengths: Sequence[int], seconds: float) -> None:
        seen.append((list(lengths), seconds))
        observe(lengths, seconds)

    cost.observe = noted
    return seen


def engine(model: Any, policy: str) -> Any:
    """An engine without a cache, whose queue takes everything."""
    import turbo_tvm

    return turbo_tvm.Engine(model, policy=policy, cache=0, max_queue=MAX_QUEUE, progress=False)


def answer_trace(serving: Any, arrival_s: np.ndarray, requests: Sequence[np.ndarray]) -> np.ndarray:
    """Submit each request at its time, whatever became of those before; latency in seconds from that time."""
    ends = np.zeros(len(requests))
    futures = []
    gc.collect()
    start = time.perf_counter() + 0.05
    for i, (due, ids) in enumerate(zip((arrival_s + start).tolist(), requests, strict=True)):
        wait = due - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        future = serving.submit(ids)
        future.add_done_callback(lambda _, i=i: ends.__setitem__(i, time.perf_counter()))
        futures.append(future)
    for future in futures:
        future.result()
    return ends - start - arrival_s


def idle_overhead(model: Any, seed: int) -> list[float]:
    """Seconds from `submit` to the start of the first kernel, an idle engine, one request at a time."""
    executor, started = model._executor, [0.0]
    function = executor.function  # put in by hand: `executor.calling` would keep the engine's thread out

    def noted(*args: Any) -> Any:
        started[0] = time.perf_counter()
        return function(*args)

    samples = []
    requests = random_ids([16] * IDLE_REQUESTS, model.manifest.request_limits.vocab_size, seed)
    if model.cost is None:
        model.measure_cost()
    with engine(model, "dp") as serving:
        serving.infer_sync(requests[0])
        executor._main = noted
        try:
            for ids in requests[1:]:
                time.sleep(IDLE_PAUSE_S)
                begin = time.perf_counter()
                serving.infer_sync(ids)
                samples.append(started[0] - begin)
        finally:
            executor._main = function
    return samples


def random_ids(lengths: Sequence[int], vocabulary: int, seed: int) -> list[np.ndarray]:
    """Token ids of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n) for n in lengths]
