"""The tables and the picture of `turbo-tvm tune`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_tvm.cli.console import add_row, console, print_table, table
from turbo_tvm.cli.pictures import save

if TYPE_CHECKING:
    from turbo_tvm.tuning.report import BucketReport, Curve
    from turbo_tvm.tuning.tune import TuningReport

_SLOWER = 0.97  # the gain below which a tuned kernel counts as slower: the rest is noise
_COLUMNS = [
    "kernel",
    "tokens>",
    "default ms>",
    "tuned ms>",
    "gain>",
    "GFLOP/s>",
    "default limit>",
    "tuned limit>",
    "setting",
]


def show_outcomes(report: TuningReport) -> None:
    """Print what tuning found, and how to use it."""
    rows = table("Tuned", ["kernel", "gain>", "by batch", "variants>", "trials>", "failed>"], "kernel")
    rows.caption = "gain: the default's time / the tuned kernel's, timed in turn after the trials, by tokens in a batch"
    for one in report.kernels:
        by_batch = ", ".join(f"{rows_}: {gain:.3f}x" for rows_, gain in one.gains.items())
        variants = str(len(one.variants)) if one.variants else "default"
        add_row(rows, one.kernel, f"{one.mean_gain:.3f}x", by_batch, variants, str(one.trials), str(one.failed))
    print_table(console(), rows)
    click.echo(f"kept in {report.logs}; to use it: turbo-tvm compile MODEL -o FILE --logs {report.logs.parent}")


def show_report(model: Path, **options: Any) -> None:
    """Time default and tuned kernels on this machine and print the report, for `tune --report`."""
    from turbo_tvm import config
    from turbo_tvm.profiling.machine_limits import machine_limits
    from turbo_tvm.progress import Progress
    from turbo_tvm.tuning.report import compare, geometric_mean
    from turbo_tvm.tuning.tune import job

    threads = config.num_threads(options["threads"])
    with Progress("report", enabled=None if not options["quiet"] else False) as step:
        step("reading the logs")
        it = job(
            model,
            **{name: options[name] for name in ("target", "precision", "lengths", "logs", "kernels", "tracker", "key")},
        )
        limits = None
        if it.remote is None:
            limits = machine_limits(threads, remeasure=True, notice=lambda text: click.echo(text, err=True), step=step)
        step("timing")
        found = compare(
            it.tasks, it.log, it.target, threads, it.buckets, limits=limits, remote=it.remote, show=step.note
        )
    if options["as_json"]:
        plain = {"limits": dataclasses.asdict(limits) if limits else None, "kernels": [_plain(one) for one in found]}
        click.echo(json.dumps(plain))
    else:
        _print(found, geometric_mean(found, {b.rows: b.weight for b in it.buckets}))
    if options["plot"] is not None:
        draw_searches(model, **options)


def draw_searches(model: Path, **options: Any) -> None:
    """Draw the best gain so far against trials, per search: the mean over kernels, and each kernel pale behind it."""
    from turbo_tvm.tuning.report import curves
    from turbo_tvm.tuning.tune import job

    found: list[Curve] = []
    for logs in (options["logs"], *options["compare"]):
        it = job(
            model,
            logs=logs,
            **{name: options[name] for name in ("target", "precision", "lengths", "kernels", "tracker", "key")},
        )
        found += curves(it.tasks, it.log, it.target)
    draw(found, options["plot"])


def draw(found: Sequence[Curve], path: Path) -> None:
    """Write the picture as PNG or SVG. Raises TurboError if the file cannot be written."""
    from matplotlib.figure import Figure  # without pyplot, which wants a display and keeps state

    from turbo_tvm.tuning.report import mean_curve

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, search in enumerate(dict.fromkeys(curve.search for curve in found)):
        color = f"C{number}"
        mine = [curve for curve in found if curve.search == search]
        for curve in mine:
            axes.step(range(1, len(curve.best) + 1), curve.best, where="post", color=color, alpha=0.2, linewidth=1)
        mean = mean_curve(found, search)
        label = f"{search}: {len(mine)} kernels, geometric mean"
        axes.step(range(1, len(mean) + 1), mean, where="post", color=color, linewidth=2.5, label=label)
    axes.set(xlabel="trials", ylabel="best so far / default")
    axes.grid(True, alpha=0.2)
    axes.legend(loc="lower right")
    save(figure, path)


def _print(found: Sequence[BucketReport], mean: float) -> None:
    rows = table("Default and tuned, in turn", _COLUMNS, "kernel")
    rows.caption = (
        f"geometric mean {mean:.3f}x. ms and GFLOP/s (tuned): the best run; gain: the lesser of the pairs' median and "
        "best over best; limit: the machine's floor / the best run; setting: all knobs of the tuned kernel"
    )
    before = ""
    for one in found:
        name = one.kernel if one.kernel != before else ""
        before = one.kernel
        limits = [f"{100 * one.floor_s / s:.0f} %" if one.floor_s else "" for s in (one.default_s, one.tuned_s)]
        rate = f"{one.flops / one.tuned_s / 1e9:,.0f}"
        times = (f"{1e3 * one.default_s:.3f}", f"{1e3 * one.tuned_s:.3f}")
        add_row(rows, name, str(sum(one.lengths)), *times, f"{one.gain:.3f}x", rate, *limits, _words(one.setting))
    print_table(console(), rows)
    if any(one.floor_s for one in found):
        click.echo(_limits(found))


def _limits(found: Sequence[BucketReport]) -> str:
    """Describe the points where the default is at the machine's limit, and those where tuned kernels were slower."""
    there = [one for one in found if one.at_the_limit]
    slow = [one for one in found if one.setting and one.gain < _SLOWER]
    lines = [f"the default is within 3 % of this machine's limit at {len(there)} of {len(found)} points"]
    lines += [f"  {_place(one)}" for one in there]
    if slow:
        lines += ["tuned was slower this time:", *(f"  {_place(one)}" for one in slow)]
    return "\n".join(lines)


def _place(one: BucketReport) -> str:
    return f"{one.kernel} at {sum(one.lengths):,} tokens ({one.gain:.3f}x)"


def _words(setting: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(setting.items())) or "default"


def _plain(one: BucketReport) -> dict[str, Any]:
    return dataclasses.asdict(one) | {"gain": one.gain, "default_s": one.default_s, "tuned_s": one.tuned_s}
