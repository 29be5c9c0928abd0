"""`turbo-tvm profile`: shows where the time of a run goes, beside this machine's limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_tvm.cli.options import Failure, debug_option, lengths_callback
from turbo_tvm.cli.pictures import check_plot

if TYPE_CHECKING:
    from turbo_tvm.profiling.roofline import MachineLimits, ProfileReport
    from turbo_tvm.runtime.model import CompiledModel


@click.command("profile")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--lengths", metavar="N,N,...", callback=lengths_callback, required=True, help="Tokens of every sequence."
)
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=20, show_default=True, help="Samples to take.")
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Threads.  [default: one per physical core]")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, with every sample.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the roofline as .png or .svg.")
@click.option("--remeasure", is_flag=True, help="Measure this machine's limits again.")
@debug_option
def profile_command(
    file: Path,
    lengths: list[int],
    rounds: int,
    threads: int | None,
    as_json: bool,
    plot: Path | None,
    remeasure: bool,
) -> None:
    """Time every kernel of an artifact, and say what is left.

    Runs a batch of random token ids and shows, for each kernel and all its calls of a run: time, share, arithmetic and
    memory rate, and the fraction of what this machine can do; then the time between kernels and in Python.

    The limits are measured once, in two seconds, and kept in the user's cache directory. A kernel's floor is the larger
    of FLOPs / peak and bytes / bandwidth; "limit" is floor / time. On a GPU there are times only, of one kernel at a
    time.

    \b
    Examples:
      turbo-tvm profile minilm.turbo --lengths 128
      turbo-tvm profile minilm.turbo --lengths 5,37,128 --plot roofline.png
      turbo-tvm profile minilm.turbo --lengths 16 --json | jq '.kernels[0]'
    """
    check_plot(plot)
    from turbo_tvm import config
    from turbo_tvm.profiling import machine_limits

    count = config.num_threads(threads)
    if remeasure or machine_limits.cached(count, notice=_silent) is None:
        import tvm  # noqa: F401  (with its compiler, before `load` imports it without)
    import turbo_tvm

    model = turbo_tvm.load(file, threads=count)
    if plot is not None and model.manifest.target.device == "cuda":
        raise Failure("a roofline needs the machine's limits, which are measured of CPUs only: leave --plot out")
    report = _profile(model, lengths, rounds, count, remeasure)
    if as_json:
        click.echo(json.dumps(plain(report), indent=1))
    else:
        from turbo_tvm.cli.profile_tables import show

        show(report)
    if plot is not None:
        from turbo_tvm.cli.roofline_plot import draw

        draw(report, plot)


def _profile(model: CompiledModel, lengths: list[int], rounds: int, threads: int, remeasure: bool) -> ProfileReport:
    from turbo_tvm.progress import Progress
    from turbo_tvm.runtime.validation import check_lengths

    check_lengths(lengths, model.manifest.request_limits)  # before seconds of measuring
    with Progress("profile") as step:
        on_gpu = model.manifest.target.device == "cuda"  # its limits are not measured
        limits = None if on_gpu else _limits(threads, remeasure, step)
        step(f"running {rounds} rounds")
        return model.profile(lengths, rounds=rounds, limits=limits)


def _limits(threads: int, remeasure: bool, step: Any) -> MachineLimits:
    from turbo_tvm.profiling.machine_limits import machine_limits

    return machine_limits(threads, remeasure=remeasure, notice=lambda text: click.echo(text, err=True), step=step)


def _silent(_text: str) -> None:
    """Drop a notice about limits that cannot be used: the call that uses the limits gives it again."""


def plain(report: ProfileReport) -> dict[str, Any]:
    """Return the report's fields, and figures that follow from them, in seconds and per second."""
    fields = dataclasses.asdict(report)
    for values, kernel in zip(fields["kernels"], report.kernels, strict=True):
        values |= {name: getattr(kernel, name) for name in ("flops_per_s", "bytes_per_s", "intensity", "fraction")}
        values["share"] = report.share(kernel.seconds)
    names = ("tokens", "kernels_s", "total_s", "tokens_per_s", "flops", "floor_s")
    return fields | {name: getattr(report, name) for name in names}
