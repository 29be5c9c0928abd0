"""`turbo-tvm inspect`: what is inside an artifact. Runs nothing of it, and imports no TVM."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_tvm.cli.options import debug_option, lengths_callback

if TYPE_CHECKING:
    from turbo_tvm.runtime.manifest import Manifest


@click.command("inspect")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, for programs.")
@click.option(
    "--lengths", metavar="N,N,...", callback=lengths_callback, help="Also the cost of a batch of these lengths."
)
@debug_option
def inspect_command(file: Path, as_json: bool, lengths: list[int] | None) -> None:
    """Show what is inside an artifact.

    The model, the CPU it was compiled for, inputs and outputs, each kernel with its shape, FLOPs and weights, buffers,
    and what was not fused and why. Every byte is verified, but no code of the file is loaded, so an artifact for
    another CPU can be inspected too.

    \b
    Examples:
      turbo-tvm inspect minilm.turbo
      turbo-tvm inspect minilm.turbo --lengths 12,200,37
      turbo-tvm inspect minilm.turbo --json | jq '.kernels[].name'
    """
    from turbo_tvm import artifact
    from turbo_tvm.errors import InputError

    manifest = artifact.read(file).manifest
    longest = manifest.bounds.max_length
    if lengths and max(lengths) > longest:
        raise InputError(f"a sequence of {max(lengths)} tokens is too long: {manifest.name} allows {longest}")
    if as_json:
        click.echo(json.dumps(_plain(file, manifest, lengths), indent=1))
        return
    from turbo_tvm.cli.inspect_tables import show

    show(file, manifest, lengths)


def _plain(file: Path, manifest: Manifest, lengths: list[int] | None) -> dict[str, Any]:
    """The manifest's own fields, and what follows from them."""
    from turbo_tvm.cli import numbers

    plain = dataclasses.asdict(manifest)
    plain["file"] = {"path": str(file), "bytes": file.stat().st_size}
    plain["totals"] = {
        "flops_per_token": numbers.flops_per_token(manifest.kernels),
        "flops_per_pair": numbers.flops_per_pair(manifest.kernels),
        "kernel_calls": sum(k.calls for k in manifest.kernels),
        "bytes_weights": sum(k.calls * k.bytes_weights for k in manifest.kernels),
        "buffer_bytes_per_token": numbers.slot_bytes(manifest.buffers, "token"),
        "buffer_bytes_per_sequence": numbers.slot_bytes(manifest.buffers, "sequence"),
    }
    if lengths:
        plain["batch"] = {"lengths": lengths, **dataclasses.asdict(numbers.batch_cost(manifest, lengths))}
    return plain
