"""`turbo-tvm inspect`: shows what is inside an artifact. It runs nothing of it, and imports no TVM."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_tvm.cli.options import debug_option, lengths_callback
from turbo_tvm.cli.pictures import can_plot, check_plot

if TYPE_CHECKING:
    from turbo_tvm.artifact.manifest import Manifest

_STRATEGIES = ("compact", "turbo2021", "pooled")  # as `planner.STRATEGIES`, which is not imported for --help


@click.command("inspect")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, for programs.")
@click.option(
    "--lengths", metavar="N,N,...", callback=lengths_callback, help="Also the cost of a batch of these lengths."
)
@click.option("--kernels", is_flag=True, help="The GPU resources of each kernel; they are in --json too.")
@click.option("--memory", is_flag=True, help="Where tensors lie in memory, for a request of each of the lengths.")
@click.option("--batch", is_flag=True, help="With --memory: for one batch of all the lengths.")
@click.option(
    "--strategy", type=click.Choice(_STRATEGIES), help=f"With --memory: the planner.  [default: {_STRATEGIES[0]}]"
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="With --memory: the picture, .png or .svg.  [default: FILE's name-memory.png, if matplotlib is installed]",
)
@debug_option
def inspect_command(
    file: Path,
    as_json: bool,
    lengths: list[int] | None,
    kernels: bool,
    memory: bool,
    batch: bool,
    strategy: str | None,
    plot: Path | None,
) -> None:
    """Show what is inside an artifact.

    The model, the CPU or GPU it was compiled for, inputs and outputs, each kernel with its shape, FLOPs and weights,
    buffers, and what was not fused and why. Every byte is verified, but no code of the file is loaded, so an artifact
    for another machine can be inspected too.

    \b
    Examples:
      turbo-tvm inspect minilm.turbo
      turbo-tvm inspect minilm.turbo --lengths 12,200,37
      turbo-tvm inspect minilm.turbo --json | jq '.kernels[].name'
      turbo-tvm inspect minilm-gpu.turbo --kernels
      turbo-tvm inspect minilm.turbo --memory --lengths 200,240
      turbo-tvm inspect minilm.turbo --memory --batch --lengths 12,200,37 --plot plan.svg
    """
    if memory and not lengths:
        raise click.UsageError("--memory needs --lengths, such as --lengths 200,240")
    given = {"--batch": batch, "--plot": plot is not None, "--strategy": strategy is not None}
    if not memory and any(given.values()):
        raise click.UsageError(f"{next(name for name, there in given.items() if there)} goes with --memory")
    check_plot(plot)
    from turbo_tvm.artifact import file as artifact
    from turbo_tvm.runtime.validation import check_lengths

    opened = artifact.read(file)
    manifest = opened.manifest
    if kernels and not as_json:
        _kernels(manifest, opened.cubins)
        return
    if memory:
        batches: list[tuple[int, ...]] = [tuple(lengths or ())] if batch else [(n,) for n in lengths or ()]
        _memory(file, manifest, batches, strategy or _STRATEGIES[0], as_json, plot)
        return
    if lengths:
        check_lengths(lengths, manifest.request_limits)
    if as_json:
        click.echo(json.dumps(_plain(file, manifest, lengths), indent=1))
        return
    from turbo_tvm.cli.inspect_tables import show

    show(file, manifest, lengths)


def _kernels(manifest: Manifest, cubins: Mapping[str, bytes]) -> None:
    """Print the GPU resources of each kernel, with a summary of its machine code where there is a disassembler."""
    from turbo_tvm import config
    from turbo_tvm.cli.gpu_tables import show
    from turbo_tvm.errors import TurboError
    from turbo_tvm.profiling import sass

    found, notes = config.nvdisasm(), []
    codes: dict[str, dict[str, str]] = {}
    if found is None:
        notes.append(
            "for what machine code consists of, NVIDIA's disassembler is needed: pip install 'turbo-tvm[cuda]'"
        )
    for name, cubin in cubins.items():
        if found is None:
            break
        try:
            counts = sass.instructions(found, cubin)
        except TurboError as error:  # a disassembler knows no GPU that its toolkit has dropped
            notes.append(f"{name}: {error}")
        else:
            codes[name] = {kernel: sass.summary(count) for kernel, count in counts.items()}
    show(manifest, codes, "\n".join(notes))


def _memory(
    file: Path,
    manifest: Manifest,
    batches: list[tuple[int, ...]],
    strategy: str,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show the memory plans of batches, as JSON or as tables, and draw them."""
    from turbo_tvm.errors import TurboError
    from turbo_tvm.runtime.memory.report import memory_report

    reports = [memory_report(manifest, lengths, strategy) for lengths in batches]
    if as_json:
        derived = [{"total": r.total, "ratio": r.ratio} for r in reports]
        plain = [dataclasses.asdict(r) | d for r, d in zip(reports, derived, strict=True)]
        click.echo(json.dumps(plain, indent=1))
    else:
        from turbo_tvm.cli.memory_tables import show

        show(reports)
    if plot is None and as_json:
        return
    if plot is None and not can_plot():
        click.echo("no picture: it needs matplotlib: pip install 'turbo-tvm[plot]'", err=True)
        return
    from turbo_tvm.cli.memory_plot import draw

    path = plot or Path(f"{file.stem}-memory.png")
    try:
        draw(reports, path)
    except TurboError as error:
        if plot is not None:
            raise
        click.echo(f"no picture: {error}; name another place with --plot", err=True)
    else:
        click.echo(f"wrote {path}", err=True)


def _plain(file: Path, manifest: Manifest, lengths: list[int] | None) -> dict[str, Any]:
    """Return the manifest's fields, and figures that follow from them, in a form for JSON."""
    from turbo_tvm.cli import numbers
    from turbo_tvm.profiling.occupancy import occupancy

    plain = dataclasses.asdict(manifest)
    for kernel, spec in zip(plain["device_kernels"], manifest.device_kernels, strict=True):
        found = occupancy(spec)
        kernel["occupancy"] = None if found is None else dataclasses.asdict(found)
    plain["file"] = {"path": str(file), "bytes": file.stat().st_size}
    plain["totals"] = {
        "flops_per_token": numbers.flops_per_token(manifest.kernels),
        "flops_per_pair": numbers.flops_per_pair(manifest.kernels),
        "kernel_calls": sum(k.calls for k in manifest.kernels),
        "bytes_weights": sum(k.calls * k.bytes_weights for k in manifest.kernels),
    }
    if lengths:
        plain["batch"] = {"lengths": lengths, **dataclasses.asdict(numbers.batch_cost(manifest, lengths))}
    return plain
