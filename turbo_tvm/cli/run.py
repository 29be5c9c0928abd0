"""`turbo-tvm run`: answers texts, token ids or images with an artifact. It imports TVM's runtime, but no PyTorch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO

import click

from turbo_tvm.cli.options import debug_option
from turbo_tvm.cli.requests import Request, read_request

_FORMATS = ("table", "json", "npy", "npz")


@click.command("run")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--text", "texts", metavar="TEXT", multiple=True, help="A text. Repeat it for more.")
@click.option(
    "--pair", "pairs", metavar="A B", nargs=2, multiple=True, help="Two texts for a cross-encoder. Repeat it for more."
)
@click.option("--ids", metavar="N,N,...", multiple=True, help="A sequence of token ids. Repeat it for more.")
@click.option(
    "--input",
    "text_file",
    metavar="FILE",
    type=click.File("rb"),
    help="One text per line, or images in a .npy file; - is stdin.",
)
@click.option(
    "--ids-file", metavar="FILE", type=click.File("rb"), help="One sequence of token ids per line; - is stdin."
)
@click.option(
    "--prompt-name",
    metavar="NAME",
    help="The model's prompt to put before each text; `inspect` lists them.  [default: the model's default, if any]",
)
@click.option("--output", "output", metavar="NAME", help="Which output of the model.  [default: its main one]")
@click.option("-o", "--save", metavar="FILE", type=click.Path(path_type=Path), help="Write here instead of on stdout.")
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    help="[default: by the name of -o; else table on a terminal, json otherwise]",
)
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Threads.  [default: one per physical core]")
@debug_option
def run_command(
    file: Path,
    texts: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    ids: tuple[str, ...],
    text_file: IO[bytes] | None,
    ids_file: IO[bytes] | None,
    prompt_name: str | None,
    output: str | None,
    save: Path | None,
    form: str | None,
    threads: int | None,
) -> None:
    """Answer texts, token ids or images with an artifact.

    All of them run as one ragged batch, in order, without padding. Texts need an artifact with a tokenizer. Images are
    float32, (channels, height, width) or several of them in one array, scaled as the model's image processor does.

    \b
    Formats:
      table   shape, norm and first values, for reading
      json    one JSON object per line, with every value
      npy     one NumPy array; the answers must have one shape
      npz     one NumPy array per answer, named 0, 1, ...

    \b
    Examples:
      turbo-tvm run minilm.turbo --text "a first text" --text "and another, longer one"
      turbo-tvm run reranker.turbo --pair "how do bees talk?" "Bees dance."
      turbo-tvm run minilm.turbo --ids 101,7592,102
      turbo-tvm run minilm.turbo --input texts.txt -o vectors.npy
      turbo-tvm run vit.turbo --input images.npy -o logits.npy
      cat texts.txt | turbo-tvm run minilm.turbo --input - | jq '.outputs.sentence_embedding[0]'
    """
    form = _format(form, save)
    request = read_request((*texts, *pairs), text_file, ids, ids_file)
    if prompt_name is not None and not request.texts:
        raise click.UsageError("--prompt-name is for texts: give them with --text or --input")
    import turbo_tvm

    model = turbo_tvm.load(file, threads=threads)
    start = time.perf_counter()
    if request.texts:
        answers = model.encode(request.texts, output=output, prompt_name=prompt_name)
    else:
        answers = model.run(request.ids or request.images, output=output)
    seconds = time.perf_counter() - start
    _emit(request, _named(answers, output or model.manifest.primary), form, save)
    if sys.stderr.isatty():
        click.echo(f"{len(answers)} answers in {1000 * seconds:.1f} ms, threads: {model.threads}", err=True)


def _format(asked: str | None, save: Path | None) -> str:
    if save is None:
        if asked in ("npy", "npz"):
            raise click.UsageError(f"--format {asked} needs a file: add -o answers.{asked}")
        return asked or ("table" if sys.stdout.isatty() else "json")
    by_name = {".npy": "npy", ".npz": "npz", ".json": "json", ".jsonl": "json", ".txt": "table"}
    form = asked or by_name.get(save.suffix)
    if form is None:
        raise click.UsageError(f"-o {save}: the name says no format; end it in .npy, .npz or .jsonl, or give --format")
    return form


def _named(answers: list, name: str | None) -> list[dict]:
    """Return a dictionary of arrays per answer, which answers of models without a main output are already."""
    return answers if name is None else [{name: answer} for answer in answers]


def _emit(request: Request, answers: list[dict], form: str, save: Path | None) -> None:
    from turbo_tvm.cli import answers as writers

    if save is None:
        writers.print_answers(request, answers, form)
    else:
        writers.save_answers(request, answers, form, save)
