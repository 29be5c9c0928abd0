"""`turbo-tvm cost`: measures what batches cost on this machine, and keeps it in the artifact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turbo_tvm.cli.options import debug_option

if TYPE_CHECKING:
    from turbo_tvm.artifact.cost_spec import CostSpec
    from turbo_tvm.artifact.manifest import RequestLimits

_LENGTHS = (8, 16, 32, 64, 128, 256, 512)
_BATCHES = (1, 4, 16, 64)


@click.command("cost")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--seconds", metavar="S", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Time to measure."
)
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Threads.  [default: one per physical core]")
@click.option("--remeasure", is_flag=True, help="Measure again what FILE already holds for this machine.")
@click.option("--json", "as_json", is_flag=True, help="The fitted figures as one JSON object.")
@debug_option
def cost_command(file: Path, seconds: float, threads: int | None, remeasure: bool, as_json: bool) -> None:
    """Measure what batches cost on this machine, and keep it in FILE.

    The batch scheduler relies on it. Where the file has no cost for its machine, an engine measures it for five seconds
    at every start. Costs are kept by CPU and number of threads; FILE is replaced as a whole, or not at all.

    \b
    Examples:
      turbo-tvm cost minilm.turbo
      turbo-tvm cost minilm.turbo --remeasure --seconds 20
    """
    import turbo_tvm
    from turbo_tvm.progress import Progress

    model = turbo_tvm.load(file, threads=threads)
    if model.cost is None or remeasure:
        with Progress("cost") as show:
            show("measuring what batches cost")
            model.measure_cost(budget_s=seconds, say=show.note)
        model.save(file)
    assert model.cost is not None
    spec = model.cost.spec
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(spec)))
    else:
        _show(spec, model.machine, model.manifest.request_limits)


def _show(spec: CostSpec, machine: str, limits: RequestLimits) -> None:
    from turbo_tvm.cli.console import add_row, console, print_table, table
    from turbo_tvm.runtime.scheduling.cost_model import cost_of

    cost = cost_of(spec)
    rows = table("Milliseconds per batch", ["tokens each>", *(f"batch {k}>" for k in _BATCHES)], "")
    rows.caption = (
        f"{machine}: {spec.kind} cost, from {spec.points} measured batches; off by {spec.error:.1%} on "
        "average on batches that it was not fitted to"
    )
    longest = limits.max_length
    shorter = [n for n in _LENGTHS if n < longest and limits.image is None]  # images are all as long
    for n in [*shorter, longest]:
        add_row(rows, str(n), *(f"{1e3 * cost([n] * k):.3g}" for k in _BATCHES))
    print_table(console(), rows)
