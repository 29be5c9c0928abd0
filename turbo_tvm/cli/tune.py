"""`turbo-tvm tune`: finds the best settings of kernels on a machine; and `tune-server`, which offers a machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_tvm.cli.options import debug_option, lengths_callback
from turbo_tvm.cli.pictures import check_plot

if TYPE_CHECKING:
    from turbo_tvm.tuning.tune import TuningReport
    from turbo_tvm.tuning.tuner import Progress

_TRIALS = 64  # as `tuning.tune.DEFAULT_TRIALS`, which would import TVM here


@click.command("tune")
@click.argument("model", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--trials",
    metavar="N",
    type=click.IntRange(1),
    default=_TRIALS,
    show_default=True,
    help="Settings to try per kernel, those in the logs included.",
)
@click.option(
    "--logs",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("tuning_logs"),
    show_default=True,
    help="Directory of logs to continue.",
)
@click.option(
    "--lengths",
    metavar="N,N,...",
    callback=lengths_callback,
    help="Requests' lengths in tokens, a sample of what is expected.  [default: 8 to 512]",
)
@click.option(
    "--kernel", "kernels", metavar="WORD", multiple=True, help="Only kernels whose names contain WORD; may be repeated."
)
@click.option("--search", metavar="NAME", default="xgb", show_default=True, help="xgb, guided by XGBoost, or random.")
@click.option("--target", metavar="NAME", help="As for compile; an artifact brings its own.  [default: cpu]")
@click.option(
    "--precision", metavar="NAME", default="fp32", show_default=True, help="As for compile; an artifact brings its own."
)
@click.option("--tracker", metavar="HOST:PORT", help="A TVM RPC tracker: measure on a machine behind it.")
@click.option("--key", metavar="NAME", help="The machine's key at the tracker.")
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the search and of the kernels' inputs.",
)
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Threads.  [default: one per physical core]")
@click.option(
    "--timeout",
    metavar="S",
    type=click.FloatRange(1),
    default=60.0,
    show_default=True,
    help="For building, or measuring, one candidate.",
)
@click.option("--report", is_flag=True, help="Time default and tuned kernels side by side, without tuning.")
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the progress of the searches as .png or .svg."
)
@click.option(
    "--compare",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    multiple=True,
    help="Logs of other searches for the plot; may be repeated.",
)
@click.option("--repair", is_flag=True, help="Move damaged lines of the logs aside; needs no MODEL.")
@click.option("--compact", is_flag=True, help="Shrink the logs: of a trial its gains, not its samples; needs no MODEL.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object, with every sample.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@debug_option
def tune_command(model: Path | None, **options: Any) -> None:
    """Find the best settings of a model's kernels on this machine, or on one behind a tracker.

    MODEL is an artifact, or what compile takes. Settings of each kernel are tried in batches of requests of the given
    lengths. Candidates are built and measured in processes of their own, checked against the default and timed in turn
    with it. Ctrl-C keeps what was measured, and the next call goes on from there. `turbo-tvm compile --logs DIR` then
    builds the model with the best settings found.

    \b
    Examples:
      turbo-tvm tune minilm.turbo
      turbo-tvm tune minilm.turbo --lengths 5,12,17,40,160 --trials 200
      turbo-tvm tune path/to/bert --precision bf16 --kernel linear
      turbo-tvm tune minilm.turbo --report --plot search.png
      turbo-tvm tune bert-gpu.turbo --tracker 10.0.0.5:9190 --key a100
      turbo-tvm tune --repair --logs tuning_logs
      turbo-tvm tune --compact --logs tuning_logs
    """
    if options["repair"] or options["compact"]:
        from turbo_tvm.cli.tune_logs import compact_logs, repair_logs

        (repair_logs if options["repair"] else compact_logs)(options["logs"])
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL': an artifact, a model folder or an ONNX file.")
    check_plot(options["plot"])
    if options["report"]:
        from turbo_tvm.cli.tune_report import show_report

        show_report(model, **options)
        return
    report = _tune(model, **options)
    if options["as_json"]:
        click.echo(json.dumps(_plain(report)))
    else:
        from turbo_tvm.cli.tune_report import show_outcomes

        show_outcomes(report)
    if options["plot"] is not None:
        from turbo_tvm.cli.tune_report import draw_searches

        draw_searches(model, **options)


@click.command("tune-server")
@click.option("--tracker", metavar="HOST:PORT", required=True, help="The TVM RPC tracker to report to.")
@click.option("--key", metavar="NAME", required=True, help="Name by which tuners find the machine, such as its model.")
@click.option("--host", metavar="ADDRESS", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option(
    "--port", metavar="N", type=click.IntRange(1, 65535), default=9091, show_default=True, help="First port to try."
)
@debug_option
def tune_server_command(tracker: str, key: str, host: str, port: int) -> None:
    """Offer this machine to tuners, through a TVM RPC tracker.

    Whoever reaches the port can run code on this machine: use it in a network that you trust.

    \b
    The machine to measure on, the one that tunes, and a tracker that both reach:
      python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190
      turbo-tvm tune-server --tracker 10.0.0.5:9190 --key a100
      turbo-tvm tune bert-gpu.turbo --tracker 10.0.0.5:9190 --key a100
    """
    from turbo_tvm.tuning.rpc_server import serve

    click.echo(f"offering this machine as {key!r} at {tracker}; Ctrl-C ends it", err=True)
    serve(tracker, key, host, port, lambda text: click.echo(text, err=True))


def _tune(model: Path, **options: Any) -> TuningReport:
    import turbo_tvm
    from turbo_tvm import config

    config.quiet_model_loading()
    names = ("trials", "logs", "kernels", "search", "target", "precision", "tracker", "key", "seed", "threads")
    chosen = {name: options[name] for name in names} | {"timeout_s": options["timeout"]}
    if options["lengths"] is not None:
        chosen["lengths"] = options["lengths"]
    with _ProgressDisplay(enabled=not options["quiet"]) as show:
        try:
            return turbo_tvm.tune(model, **chosen, show=show)
        except KeyboardInterrupt:
            click.echo(
                f"\ninterrupted: {options['logs']} holds all that was measured; the same command goes on", err=True
            )
            raise


class _ProgressDisplay:
    """Progress on stderr: a line per finished kernel and, on a terminal, a line that is updated."""

    def __init__(self, enabled: bool):
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._console.status("starting") if enabled and sys.stderr.isatty() else None
        self._enabled, self._printed, self._note = enabled, 0, ""

    def __enter__(self) -> _ProgressDisplay:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, progress: Progress) -> None:
        if not self._enabled:
            return
        for one in progress.finished[self._printed :]:
            failed = f", {one.failed} failed" if one.failed else ""
            self._console.print(f"{one.kernel}: {one.mean_gain:.3f}x the default ({one.trials} trials{failed})")
        self._printed = len(progress.finished)
        if progress.note.startswith("waiting") and progress.note != self._note and not self._status:
            self._console.print(progress.note)
        self._note = progress.note
        if self._status:
            self._status.update(status_line(progress))


def status_line(p: Progress) -> str:
    """Return the progress in one line, for a terminal."""
    rate = f", {p.gflops:,.0f} GFLOP/s" if p.gflops else ""
    left = f", {duration(p.seconds_left)} left" if p.seconds_left else ""
    note = f" ({p.note})" if p.note else ""
    return f"{p.kernel} ({p.number} of {p.kernels}): trial {p.done} of {p.trials}, best {p.best:.3f}x{rate}{left}{note}"


def duration(seconds: float) -> str:
    """Return a duration as text, in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plain(report: TuningReport) -> dict[str, Any]:
    kernels = [
        {
            "kernel": one.kernel,
            "gain": one.mean_gain,
            "gains": one.gains,
            "trials": one.trials,
            "failed": one.failed,
            "variants": [{"max_rows": v.max_rows, "setting": dict(v.setting)} for v in one.variants],
        }
        for one in report.kernels
    ]
    return {"target": report.target, "logs": str(report.logs), "kernels": kernels}
