"""`turbo-tvm compile`: from a model folder or an ONNX file to an artifact."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from turbo_tvm.cli.options import Failure, debug_option, image_size_callback

if TYPE_CHECKING:
    from turbo_tvm.artifact.manifest import Manifest
    from turbo_tvm.runtime.model import CompiledModel


@click.command("compile")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), required=True, help="Artifact to write."
)
@click.option(
    "--target",
    metavar="NAME",
    default="cpu",
    show_default=True,
    help="'cpu' is this machine; 'cpu:x86-64-v3' another; 'cuda:sm_80' a GPU, 'cuda:sm_80,sm_90' several.",
)
@click.option(
    "--precision",
    metavar="NAME",
    default="fp32",
    show_default=True,
    help="Arithmetic: fp32, bf16 (AVX512-BF16, or GPUs from sm_80 on) or fp16 (GPUs).",
)
@click.option(
    "--max-length", metavar="N", type=click.IntRange(1), help="Longest sequence in tokens.  [default: the model's]"
)
@click.option(
    "--image-size",
    metavar="N|HxW",
    callback=image_size_callback,
    help="Height and width of images in pixels.  [default: the model's]",
)
@click.option("--name", metavar="NAME", help="Name of the model in the artifact.  [default: the folder's name]")
@click.option(
    "--tokenizer",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The tokenizer.json to put into the artifact.  [default: the folder's own]",
)
@click.option(
    "--logs",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Tuning logs to take kernels' settings from (turbo-tvm tune).  [default: those that come with turbo-tvm]",
)
@click.option("--no-logs", is_flag=True, help="Build every kernel with its default setting.")
@click.option("--check", is_flag=True, help="Compare the result with the ONNX file on random ragged batches.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@debug_option
def compile_command(
    model: Path,
    output: Path,
    target: str,
    precision: str,
    max_length: int | None,
    image_size: tuple[int, int] | None,
    name: str | None,
    tokenizer: Path | None,
    logs: Path | None,
    no_logs: bool,
    check: bool,
    quiet: bool,
) -> None:
    """Compile a model folder or an ONNX file into one file.

    MODEL is a folder with config.json, model.safetensors and, for text input, a tokenizer, as Hugging Face and
    sentence-transformers write them; or an ONNX file of opset 11 to 23. The result serves every batch size and length
    up to --max-length, or images of one size.

    Compiling needs a C++ compiler, PyTorch and transformers for folders, turbo-tvm[onnx] for ONNX files, and for GPUs
    nvcc or the packages of turbo-tvm[cuda12], but no GPU; running the file needs none of them.

    \b
    Examples:
      turbo-tvm compile path/to/minilm -o minilm.turbo
      turbo-tvm compile path/to/bert.onnx -o bert.turbo --check
      turbo-tvm compile path/to/bert -o bert.turbo --max-length 128
      turbo-tvm compile path/to/bert -o bert-gpu.turbo --target cuda:sm_80,sm_90 --precision fp16
      turbo-tvm compile path/to/bert -o bert.turbo --precision bf16
      turbo-tvm compile path/to/bert -o bert.turbo --target cpu:x86-64-v3
      turbo-tvm compile path/to/vit -o vit.turbo --image-size 384
      turbo-tvm compile path/to/bert -o bert.turbo --logs tuning_logs
    """
    if logs is not None and no_logs:
        raise click.UsageError("--logs and --no-logs exclude each other")
    _check_output(output)
    if check and _onnx_file(model) is None:
        raise Failure(f"--check is for ONNX files; {model} is compared with PyTorch at the end of every compile")
    from turbo_tvm import config
    from turbo_tvm.artifact import file as artifact

    config.quiet_model_loading()
    from turbo_tvm.compiler.compile import compile

    compiled = compile(
        model,
        target=target,
        precision=precision,
        name=name,
        max_length=max_length,
        image_size=image_size,
        tokenizer=tokenizer,
        logs=False if no_logs else logs or True,
        progress=not quiet,
    )
    compiled.save(output)
    if not quiet:
        click.echo(_summary(output, artifact.read(output).manifest))
        for note in compiled.manifest.tuning:
            click.echo(f"note: not tuned, {note}", err=True)
    if check:
        _print_check(_onnx_file(model) or model, compiled, progress=not quiet)


def _onnx_file(model: Path) -> Path | None:
    """Return the ONNX file that MODEL is or holds; None for a folder without one."""
    from turbo_tvm.frontends.importer import onnx_file

    return onnx_file(model)


def _print_check(path: Path, compiled: CompiledModel, progress: bool) -> None:
    """Print how far each output is from the ONNX file's own. Raises Failure if that is too far."""
    from turbo_tvm.frontends.onnx.check import check
    from turbo_tvm.frontends.sample import TOLERANCES

    found = check(path, compiled, progress=progress)
    count, shortest, longest = len(found.lengths), min(found.lengths), max(found.lengths)
    click.echo(f"agreement with {found.reference} on {count} sequences of {shortest} to {longest} tokens:")
    for one in found.outputs:
        click.echo(f"  {one.output}  largest difference {one.difference:.2g}, largest value {one.largest:.3g}")
    allowed = TOLERANCES[compiled.manifest.precision]
    far = [one.output for one in found.outputs if not one.difference <= allowed * max(one.largest, 1e-6)]
    if far:
        raise Failure(f"{', '.join(far)}: differs by more than {allowed:.1%} of its largest value; do not use the file")


def _check_output(output: Path) -> None:
    """Raise Failure if the output cannot be written: before a minute of work, not after it."""
    if output.is_dir():
        raise Failure(f"{output} is a directory; -o needs the path of a file, such as {output / 'model.turbo'}")
    if not output.resolve().parent.is_dir():
        raise Failure(f"cannot write {output}: there is no directory {output.resolve().parent}; create it first")


def _summary(output: Path, manifest: Manifest) -> str:
    from turbo_tvm.cli.numbers import size, tuned_words, why_padded

    kernels = f"{len(manifest.kernels)} kernels, {sum(k.calls for k in manifest.kernels)} calls"
    lines = [
        f"{output}  {size(output.stat().st_size)}",
        f"  model      {manifest.name} ({manifest.model_type}), {manifest.source_parameters / 1e6:.1f} M parameters",
        f"  target     {manifest.target.name} ({manifest.target.mcpu}), {manifest.precision}{_spills(manifest)}",
        f"  layout     {manifest.layout}{why_padded(manifest)}",
        f"  code       {kernels}{tuned_words(manifest)}",
        f"next: {_next_command(output, manifest)}",
    ]
    return "\n".join(lines)


def _spills(manifest: Manifest) -> str:
    spilled = sum(kernel.spill_bytes > 0 for kernel in manifest.device_kernels)
    return f"; {spilled} GPU kernels spill registers" if spilled else ""


def _next_command(output: Path, manifest: Manifest) -> str:
    if manifest.target.architectures:  # this machine may have no such GPU
        return f"turbo-tvm inspect {shlex.quote(str(output))} --kernels"
    if manifest.request_limits.image is not None:
        return f"turbo-tvm run {shlex.quote(str(output))} --input images.npy"
    request = '--text "any text"' if "tokenizer.json" in manifest.members else "--ids 1,2,3"
    return f"turbo-tvm run {shlex.quote(str(output))} {request}"
