"""What a user asks `turbo-tvm run` to answer: texts or token ids, from options, files or stdin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

import click

from turbo_tvm.errors import InputError

_HINT = "give texts with --text or --input, or token ids with --ids or --ids-file"


@dataclass(frozen=True)
class Request:
    """Texts or token id sequences, in order; the other one is empty."""

    texts: tuple[str, ...] = ()
    ids: tuple[list[int], ...] = ()

    @property
    def is_ids(self) -> bool:
        """Whether this asks with token ids."""
        return bool(self.ids)

    @property
    def labels(self) -> list[str]:
        """What was asked, one line each."""
        return [" ".join(map(str, ids)) for ids in self.ids] or list(self.texts)


def read_request(
    texts: Iterable[str], text_file: IO[bytes] | None, ids: Iterable[str], ids_file: IO[bytes] | None
) -> Request:
    """The request of the four options; those on the command line come before those in a file."""
    all_texts = [*texts, *_lines(text_file)]
    all_ids = [*ids, *_lines(ids_file)]
    if all_texts and all_ids:
        raise click.UsageError(f"texts and token ids cannot be mixed: {_HINT}")
    if not all_texts and not all_ids:
        if text_file is not None or ids_file is not None:
            raise InputError("the input is empty: at least one line is needed")
        raise click.UsageError(f"there is nothing to run: {_HINT}")
    return Request(tuple(all_texts), tuple(_parse_ids(line) for line in all_ids))


def _lines(file: IO[bytes] | None) -> list[str]:
    if file is None:
        return []
    try:
        text = file.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the input is not UTF-8 text: {error}") from error
    except OSError as error:
        raise InputError(f"the input cannot be read: {error.strerror or error}") from error
    lines = text.split("\n")  # and not at the other characters that str.splitlines takes for line ends
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        short = text if len(text) <= 60 else f"{text[:60]}..."
        raise InputError(f"{short!r} is not a list of token ids; write whole numbers such as 101,7592,102") from None
