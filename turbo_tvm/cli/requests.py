"""Requests of `turbo-tvm run`: texts, token ids or images, from options, files or stdin."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import click

from turbo_tvm.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from turbo_tvm.runtime.text import Text

_HINT = (
    "give texts with --text, --pair or --input, token ids with --ids or --ids-file, or images with --input and a .npy "
    "file"
)
_NUMPY = b"\x93NUMPY"  # how a .npy file begins


@dataclass(frozen=True)
class Request:
    """Texts, token id sequences or images, in order; of these three, two are empty."""

    texts: tuple[Text, ...] = ()
    ids: tuple[list[int], ...] = ()
    images: tuple[np.ndarray, ...] = ()

    @property
    def labels(self) -> list[str]:
        """A line of text for each."""
        images = [f"image of {' x '.join(map(str, image.shape))}" for image in self.images]
        return images or [" ".join(map(str, ids)) for ids in self.ids] or [_label(text) for text in self.texts]

    def as_json(self, index: int) -> dict[str, Any]:
        """Return one of them by its kind, in a form for JSON; of an image its shape."""
        if self.images:
            return {"image": list(self.images[index].shape)}
        if self.ids:
            return {"ids": self.ids[index]}
        text = self.texts[index]
        return {"text": text} if isinstance(text, str) else {"pair": list(text)}


def _label(text: Text) -> str:
    return text if isinstance(text, str) else " | ".join(text)


def read_request(
    texts: Iterable[Text], text_file: IO[bytes] | None, ids: Iterable[str], ids_file: IO[bytes] | None
) -> Request:
    """Collect what the options ask for; texts and ids on the command line come before those in a file.

    Raises a usage error for a mixture or nothing, InputError for a file that cannot be used.
    """
    data = _bytes(text_file)
    images = _images(data) if data.startswith(_NUMPY) else ()
    all_texts = [*texts, *_lines(b"" if images else data)]
    all_ids = [*ids, *_lines(_bytes(ids_file))]
    if sum(map(bool, (all_texts, all_ids, images))) > 1:
        raise click.UsageError(f"texts, token ids and images cannot be mixed: {_HINT}")
    if images:
        return Request(images=images)
    if not all_texts and not all_ids:
        if text_file is not None or ids_file is not None:
            raise InputError("the input is empty: at least one line is needed")
        raise click.UsageError(f"there is nothing to run: {_HINT}")
    return Request(tuple(all_texts), tuple(_parse_ids(line) for line in all_ids))


def _bytes(file: IO[bytes] | None) -> bytes:
    try:
        return b"" if file is None else file.read()
    except OSError as error:
        raise InputError(f"the input cannot be read: {error.strerror or error}") from error


def _images(data: bytes) -> tuple[np.ndarray, ...]:
    """Return the images of a .npy file: one (channels, height, width), or an array of them. Raises InputError."""
    import numpy as np

    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"the input is a damaged .npy file: {error}") from error
    if array.ndim not in (3, 4) or not array.size:
        raise InputError(
            f"the input is an array of shape {array.shape}; images are (channels, height, width), or several of them "
            "(count, channels, height, width)"
        )
    return tuple(array) if array.ndim == 4 else (array,)


def _lines(data: bytes) -> list[str]:
    if not data:
        return []
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the input is not UTF-8 text: {error}") from error
    lines = text.split("\n")  # unlike str.splitlines, which splits at other characters too
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        short = text if len(text) <= 60 else f"{text[:60]}..."
        raise InputError(f"{short!r} is not a list of token ids; write whole numbers such as 101,7592,102") from None
