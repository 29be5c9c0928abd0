"""What scheduling itself takes: the time of a plan by policy, and of simulating a million requests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from . import machine, pages
from .report import markdown_row
from .results import described

WAITING = (1, 2, 10, 100, 256, 1000)
ROUNDS = 25
REQUESTS, REPLICAS = 1_000_000, 64
LOAD = 0.8  # of what the replicas bear one by one
# of BERT-base on a Xeon, fp32, two threads, as `turbo-tvm cost` measured it
TERMS, KNOTS = (1.02e-2, 0.0, 1.2e-7, 5.1e-4, 3.3e-4, 4.8e-4, 4.6e-4), (16, 64, 256)
COLUMNS = ("policy", *(f"{n:,} waiting" for n in WAITING))


def run(command: str, seed: int, requests: int, out: Path, console: Console) -> None:
    """Measure both and write the page."""
    from turbo_tvm.artifact.cost_spec import CostSpec
    from turbo_tvm.runtime.scheduling.cost_model import PackedCost
    from turbo_tvm.runtime.scheduling.scheduler import POLICIES

    cost = PackedCost(CostSpec("packed", terms=TERMS, knots=KNOTS))
    planning = {policy: {n: planning_times(policy, n, cost, seed) for n in WAITING} for policy in POLICIES}
    console.print(table(_planning_summary(planning)))
    simulated = {}
    for policy in ("nobatch", "dp"):
        simulated[policy] = simulated_time(policy, cost, requests, seed)
        console.print(f"{requests:,} requests over {REPLICAS} replicas, {policy}: {simulated[policy]['seconds']:.1f} s")
    report = {
        **machine.measured_by(command, 1),
        "planning_s": planning,
        "requests": requests,
        "simulated": simulated,
    }
    pages.publish(PAGE, report, out / "scheduling.json", console)


def planning_times(policy: str, waiting: int, cost: Any, seed: int) -> list[float]:
    """Seconds of a plan, a sample per round, each of other requests: lengths 2..100, deadlines within five seconds."""
    from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
    from turbo_tvm.runtime.scheduling.scheduler import POLICIES

    limits, samples = BatchLimits(max_batch=64, max_tokens=8192, max_wait_s=1.0), []
    for number in range(ROUNDS):
        rng = np.random.default_rng((seed, number))
        rows = zip(rng.integers(2, 101, waiting).tolist(), rng.uniform(0, 5, waiting).tolist(), strict=True)
        requests = [Request(i, length, 1e-3 * i, due) for i, (length, due) in enumerate(rows)]
        start = time.perf_counter()
        POLICIES[policy](requests, cost, limits)
        samples.append(time.perf_counter() - start)
    return samples


def simulated_time(policy: str, cost: Any, requests: int, seed: int) -> dict[str, float]:
    """Seconds to simulate Poisson arrivals of lengths 2..100."""
    from turbo_tvm.runtime.scheduling.arrivals import poisson, uniform
    from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits
    from turbo_tvm.runtime.scheduling.simulator import simulate

    one = sum(cost([n]) for n in range(2, 101)) / 99
    trace = poisson(LOAD * REPLICAS / one, requests, uniform(2, 100), seed)
    limits = BatchLimits(max_batch=64, max_tokens=8192, max_wait_s=1.0)
    start = time.perf_counter()
    found = simulate(trace, cost, policy=policy, limits=limits, replicas=REPLICAS)
    return {"seconds": time.perf_counter() - start, "mean_s": found.mean_s, "p99_s": found.percentile_s(99)}


def summarized(report: dict[str, Any]) -> dict[str, Any]:
    """Return median, quartiles and worst time of a plan in place of its samples."""
    return {**report, "planning_s": _planning_summary(report["planning_s"])}


def _planning_summary(planning: dict[str, Any]) -> dict[str, Any]:
    return {
        policy: {count: {**described(samples), "worst": max(samples)} for count, samples in by_count.items()}
        for policy, by_count in planning.items()
    }


def rows(planning: dict[str, Any]) -> list[tuple[str, ...]]:
    """Median and worst time by policy, in microseconds."""
    return [
        (policy, *(f"{1e6 * s['median']:,.0f} us (worst {1e6 * s['worst']:,.0f})" for s in by_count.values()))
        for policy, by_count in planning.items()
    ]


def table(planning: dict[str, Any]) -> Table:
    """The same for a terminal."""
    made = Table(*COLUMNS)
    for row in rows(planning):
        made.add_row(*row)
    return made


def markdown(report: dict[str, Any], name: str = "scheduling") -> str:
    """The page of a summary."""
    lines = "\n".join(markdown_row(line) for line in [COLUMNS, ["---"] * len(COLUMNS), *rows(report["planning_s"])])
    took = "; ".join(f"{policy} {found['seconds']:.1f} s" for policy, found in report["simulated"].items())
    return (
        f"# What scheduling takes\n\n{report['machine']['cpu']}, one thread\n\n"
        f"    {report['command']}    # {report['started']}, revision {report['revision']}\n\n"
        f"A plan of requests that wait, lengths 2..100, batches of at most 64, median of {ROUNDS}:\n\n{lines}\n\n"
        f"Simulating {report['requests']:,} requests over {REPLICAS} replicas at {LOAD:.0%} of what they bear one by "
        f"one: {took}.\n"
    )


PAGE = pages.Page("scheduling", summarized, markdown)
