"""Writing the answers of `turbo-tvm run`: a table, JSON lines, or NumPy files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from turbo_tvm.cli.console import add_row, console, table
from turbo_tvm.cli.requests import Request
from turbo_tvm.errors import TurboError

_SHOWN_VALUES = 4
_LABEL_CHARACTERS = 48

Answer = dict[str, np.ndarray]


def print_answers(request: Request, answers: list[Answer], form: str) -> None:
    """Print answers on stdout, as "table" or "json"."""
    if form == "table":
        console().print(_table(request, answers))
        return
    for line in _json_lines(request, answers):
        click.echo(line)


def save_answers(request: Request, answers: list[Answer], form: str, path: Path) -> None:
    """Write answers to a file. Raises TurboError where they do not fit the format or the file cannot be written."""
    try:
        if form == "npy":
            values = _stacked(answers, path)
            with path.open("wb") as file:  # numpy adds a suffix to a name without it
                np.save(file, values)
        elif form == "npz":
            with path.open("wb") as file:
                np.savez(file, **_arrays(answers))  # type: ignore[arg-type]
        else:
            path.write_text(_text(request, answers, form))
    except OSError as error:
        raise TurboError(f"cannot write {path}: {error.strerror or error}") from error


def _text(request: Request, answers: list[Answer], form: str) -> str:
    if form == "json":
        return "".join(f"{line}\n" for line in _json_lines(request, answers))
    out = console()
    with out.capture() as captured:
        out.print(_table(request, answers))
    return captured.get()


def _json_lines(request: Request, answers: list[Answer]) -> Iterator[str]:
    for i, answer in enumerate(answers):
        outputs = {name: _plain(value) for name, value in answer.items()}
        yield json.dumps({"index": i, **request.as_json(i), "outputs": outputs})


def _plain(value: Any) -> Any:
    # Nine digits identify every fp32 value; as a double it would be written with seventeen.
    array = np.asarray(value)
    return float(f"{array:.9g}") if array.ndim == 0 else [_plain(row) for row in array]


def _stacked(answers: list[Answer], path: Path) -> np.ndarray:
    if len(answers[0]) > 1:
        raise TurboError(f"the model has the outputs {', '.join(answers[0])}: name one with --output, or write .npz")
    values = [np.asarray(value) for answer in answers for value in answer.values()]
    shapes = sorted({value.shape for value in values})
    if len(shapes) > 1:
        raise TurboError(
            f"the answers have different shapes ({shapes[0]} to {shapes[-1]}), and .npy holds one array: "
            f"write {path.with_suffix('.npz').name} instead"
        )
    return np.stack(values)


def _arrays(answers: list[Answer]) -> dict[str, np.ndarray]:
    """Return the arrays by the names '0', '1', ... for one output, '0.name' for several."""
    several = len(answers[0]) > 1
    return {
        f"{i}.{name}" if several else str(i): np.asarray(value)
        for i, answer in enumerate(answers)
        for name, value in answer.items()
    }


def _table(request: Request, answers: list[Answer]) -> Table:
    names = list(answers[0])
    several = len(names) > 1
    columns = ["#>", "request", *(["output"] if several else []), "shape", "norm>", "first values"]
    rows = table("" if several else names[0], columns, "request")
    for i, (label, answer) in enumerate(zip(request.labels, answers, strict=True)):
        for name, value in answer.items():
            add_row(rows, str(i), _short(label), *([name] if several else []), *_figures(np.asarray(value)))
    return rows


def _figures(array: np.ndarray) -> tuple[str, str, str]:
    """Return an array's shape, Euclidean norm and first values, as text."""
    first = " ".join(f"{value:+.4f}" for value in array.reshape(-1)[:_SHOWN_VALUES])
    more = " ..." if array.size > _SHOWN_VALUES else ""
    return " x ".join(map(str, array.shape)) or "1", f"{np.linalg.norm(array):.4f}", first + more


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[: _LABEL_CHARACTERS - 3]}..."
