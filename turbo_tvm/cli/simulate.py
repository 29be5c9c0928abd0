"""`turbo-tvm simulate`: simulates an engine under load, by scheduling policy."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_tvm.cli.options import debug_option
from turbo_tvm.cli.pictures import check_plot

if TYPE_CHECKING:
    from turbo_tvm.progress import Progress
    from turbo_tvm.runtime.scheduling.arrivals import Trace
    from turbo_tvm.runtime.scheduling.cost_model import PackedCost, PaddedCost

_POLICIES = ("nobatch", "naive", "dp", "dp_latency", "deadline", "token_budget")  # not imported for --help
_SHOWN = ("nobatch", "naive", "dp")
_FRACTIONS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # of the rate that requests run one by one can bear
_ARRIVALS = ("poisson", "bursty")


def _range_callback(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, int]:
    low, dots, high = value.partition("..")
    if not (low.isdecimal() and (high.isdecimal() if dots else not high)) or not 1 <= int(low) <= int(high or low):
        raise click.BadParameter(f"{value!r} is no range of lengths such as 2..100")
    return int(low), int(high or low)


def _rates_callback(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        rates = [float(part) for part in value.replace(",", " ").split()]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise click.BadParameter(f"{value!r} is no list of requests per second such as 50,100,200")
    return sorted(rates)


@click.command("simulate")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--lengths", metavar="A..B", default="2..100", show_default=True, callback=_range_callback, help="Range of lengths."
)
@click.option(
    "--rates", metavar="R,R,...", callback=_rates_callback, help="Requests/s.  [default: around the capacity]"
)
@click.option(
    "--policy",
    "policies",
    type=click.Choice(_POLICIES),
    multiple=True,
    help=f"Policy; may be repeated.  [default: {', '.join(_SHOWN)}]",
)
@click.option(
    "--trigger", type=click.Choice(("hungry", "lazy")), default="hungry", show_default=True, help="When to plan."
)
@click.option(
    "--arrivals", type=click.Choice(_ARRIVALS), default="poisson", show_default=True, help="Kind of arrivals."
)
@click.option(
    "--trace", metavar="CSV", type=click.Path(path_type=Path), help="Real arrivals: columns arrival_s and length."
)
@click.option(
    "--replicas", metavar="N", type=click.IntRange(1), default=1, show_default=True, help="Models that serve."
)
@click.option(
    "--requests", metavar="N", type=click.IntRange(10), default=20_000, show_default=True, help="Number per rate."
)
@click.option(
    "--max-batch", metavar="N", type=click.IntRange(1), default=64, show_default=True, help="Sequences at most."
)
@click.option(
    "--max-tokens", metavar="N", type=click.IntRange(1), default=8192, show_default=True, help="Tokens at most."
)
@click.option("--timeout", metavar="S", type=click.FloatRange(0, min_open=True), help="A deadline for every request.")
@click.option(
    "--threads", metavar="N", type=click.IntRange(1), help="Threads of a model.  [default: one per physical core]"
)
@click.option("--machine", metavar="NAME", help="Another machine whose cost FILE holds, as `inspect --json` names it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of arrivals and lengths.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw latency against rate: .png or .svg."
)
@debug_option
def simulate_command(
    file: Path,
    lengths: tuple[int, int],
    rates: list[float] | None,
    policies: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
    **options: Any,
) -> None:
    """Simulate an engine under load.

    Runs the engine's own scheduler against the cost that FILE holds for this machine (`turbo-tvm cost` measures it):
    latency and throughput by policy and rate, for any number of replicas. No code of the file is loaded.

    \b
    Examples:
      turbo-tvm simulate minilm.turbo --lengths 2..100 --plot load.png
      turbo-tvm simulate minilm.turbo --lengths 5..500 --policy nobatch --policy dp --rates 20,40,60
      turbo-tvm simulate minilm.turbo --trace yesterday.csv --replicas 8
    """
    check_plot(plot)
    cost, max_length = _cost(file, options["threads"], options["machine"])
    results = _simulate(cost, _traces(cost, max_length, lengths, rates, options), policies or _SHOWN, options)
    if as_json:
        click.echo(json.dumps(results))
    else:
        _show(results, options["replicas"])
    if plot is not None:
        from turbo_tvm.cli.simulation_plot import draw

        draw(results, plot, f"{file.stem}: simulated, {options['replicas']} replica(s)")


def _cost(file: Path, threads: int | None, machine: str | None) -> tuple[PackedCost | PaddedCost, int]:
    """Return the cost that the file holds for a machine, and the longest sequence in tokens. Raises TurboError."""
    from turbo_tvm import config
    from turbo_tvm.artifact import file as artifact
    from turbo_tvm.errors import TurboError
    from turbo_tvm.runtime.device.cpu_features import machine_name
    from turbo_tvm.runtime.scheduling.cost_model import cost_of

    manifest = artifact.read(file).manifest
    name = machine or machine_name(config.num_threads(threads))
    if name not in manifest.costs:
        known = "; ".join(manifest.costs) or "none"
        raise TurboError(
            f"{file} holds no cost for {name!r} (it has: {known}): measure it with `turbo-tvm cost {file}`, or name "
            "another machine with --machine"
        )
    return cost_of(manifest.costs[name]), manifest.request_limits.max_length


def _simulate(
    cost: Any, traces: list[Trace], policies: tuple[str, ...], options: dict[str, Any]
) -> list[dict[str, Any]]:
    from turbo_tvm.progress import Progress
    from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits
    from turbo_tvm.runtime.scheduling.simulator import is_bounded, simulate

    limits = BatchLimits(options["max_batch"], options["max_tokens"], max_wait_s=1.0)
    results = []
    with Progress("simulate") as show:
        for trace in traces:
            for policy in policies:
                show(f"{policy} at {trace.rate:.3g} requests/s")
                found = simulate(
                    trace,
                    cost,
                    policy=policy,
                    trigger=options["trigger"],
                    limits=limits,
                    replicas=options["replicas"],
                    timeout_s=options["timeout"],
                    say=partial(_note, show, len(trace)),
                )
                results.append(
                    {
                        "policy": policy,
                        "rate": trace.rate,
                        "mean_s": found.mean_s,
                        **{f"p{p}_s": found.percentile_s(p) for p in (50, 95, 99)},
                        "throughput": found.throughput,
                        "mean_batch": float(found.batch_sizes.mean()),
                        "busy": found.busy,
                        "bounded": is_bounded(trace, found.latency_s),
                        "in_time": None
                        if options["timeout"] is None
                        else float((found.latency_s <= options["timeout"]).mean()),
                    }
                )
    return results


def _note(show: Progress, requests: int, done: int) -> None:
    show.note(f"{done:,} of {requests:,} requests")


def _traces(
    cost: Any, max_length: int, lengths: tuple[int, int], rates: list[float] | None, options: dict[str, Any]
) -> list[Trace]:
    """Return a stream of arrivals per rate; a trace as it was recorded if no rates are given. Raises InputError."""
    from turbo_tvm.errors import InputError
    from turbo_tvm.runtime.scheduling import arrivals

    read = None if options["trace"] is None else arrivals.read_trace(options["trace"])
    longest = lengths[1] if read is None else int(read.lengths.max())
    if longest > max_length:
        raise InputError(f"the model takes sequences of up to {max_length} tokens, and {longest} are asked for")
    if read is not None:
        return [read.at_rate(rate) for rate in rates or [read.rate]]
    if rates is None:
        one = sum(cost([n]) for n in range(lengths[0], lengths[1] + 1)) / (lengths[1] - lengths[0] + 1)
        rates = [fraction * options["replicas"] / one for fraction in _FRACTIONS]
    make = getattr(arrivals, options["arrivals"])
    return [make(rate, options["requests"], arrivals.uniform(*lengths), options["seed"]) for rate in rates]


def _show(results: list[dict[str, Any]], replicas: int) -> None:
    from turbo_tvm.cli.console import add_row, console, print_table, table

    in_time = results[0]["in_time"] is not None
    columns = [
        "policy",
        "requests/s>",
        "mean ms>",
        "p50>",
        "p95>",
        "p99>",
        "batch>",
        "busy>",
        "bounded",
        *(["in time>"] * in_time),
    ]
    rows = table(f"Simulated, {replicas} replica{'s' if replicas > 1 else ''}", columns, "")
    rows.caption = "bounded: the queue did not grow through the whole stream"
    for r in sorted(results, key=lambda r: (_POLICIES.index(r["policy"]), r["rate"])):
        times = (f"{1e3 * r[key]:,.1f}" for key in ("mean_s", "p50_s", "p95_s", "p99_s"))
        end = [f"{r['in_time']:.1%}"] if in_time else []
        add_row(
            rows,
            r["policy"],
            f"{r['rate']:,.1f}",
            *times,
            f"{r['mean_batch']:.1f}",
            f"{r['busy']:.0%}",
            "yes" if r["bounded"] else "no",
            *end,
        )
    print_table(console(), rows)
