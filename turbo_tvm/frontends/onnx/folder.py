"""Read what lies beside an ONNX file, in folders as optimum writes them: tokenizer, labels, longest sequence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.imported import labels_in

_PLACES = ("model.onnx", "onnx/model.onnx")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_LONGEST = (("sentence_bert_config.json", "max_seq_length"), ("config.json", "max_position_embeddings"))


@dataclass(frozen=True)
class Beside:
    """What belongs to an ONNX file."""

    name: str  # the file's, or the folder's for a file that is only called model
    tokenizer: str | None  # the text of a `tokenizer.json`
    longest: int | None  # sequence, in tokens
    labels: tuple[str, ...] = ()  # of a classifier


def file_in(folder: Path) -> Path | None:
    """Return the ONNX file of a folder; None if it has none, or has weights for PyTorch."""
    if any((folder / name).exists() for name in _WEIGHTS):
        return None
    return next((folder / place for place in _PLACES if (folder / place).is_file()), None)


def beside(path: Path) -> Beside:
    """Return what belongs to an ONNX file. Raises UnsupportedModelError for what is there and cannot be read."""
    folder = path.absolute().parent  # a link's own: caches link files to where nothing is beside them
    folder = folder.parent if folder.name == "onnx" else folder
    tokenizer = folder / "tokenizer.json"
    text = _read(tokenizer) if tokenizer.exists() else None
    lengths = [_number(_settings(folder / name).get(key)) for name, key in _LONGEST]
    labels = labels_in(_settings(folder / "config.json").get("id2label"))
    name = folder.name if path.stem == "model" and folder.name else path.stem
    return Beside(name, text, next((n for n in lengths if n is not None), None), labels)


def _settings(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} without the file."""
    if not path.exists():
        return {}
    try:
        values: Any = json.loads(_read(path))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error
