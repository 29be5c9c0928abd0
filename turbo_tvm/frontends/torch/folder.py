"""Read model folders, as Hugging Face and sentence-transformers write them: configuration, weights and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.options import DEFAULTS, ImportOptions
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.frontends.torch.sentence import SentenceEncoder


def import_folder(folder: Path, options: ImportOptions = DEFAULTS) -> Imported:
    """Import the model of a folder; name, longest sequence and tokenizer are the folder's by default.

    Raises UnsupportedModelError, as `load_folder` and `import_module` do.
    """
    module, tokenizer, longest = load_folder(folder)
    return import_module(module, options.or_else(folder.resolve().name, longest, tokenizer))


def load_folder(folder: Path) -> tuple[nn.Module, str | None, int | None]:
    """Return a folder's model, the text of its `tokenizer.json`, and its longest sequence in tokens, if it names one.

    A sentence-transformers folder becomes a `SentenceEncoder` with its pooling and normalisation. Raises
    UnsupportedModelError for a folder that is not a model, a model type that transformers does not know, and modules
    that are not supported.
    """
    config = _read_json(folder / "config.json", dict)
    stages = _stages(folder)
    model = _load(folder, config, bare=stages is not None)
    if stages is not None:
        model = SentenceEncoder(model, **stages)
    return model, _tokenizer(folder), _max_length(folder)


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a JSON {type(value).__name__}, not a {kind.__name__}")
        return value
    except FileNotFoundError:
        raise UnsupportedModelError(
            f"{path.parent} is not a model folder: it has no {path.name}; a folder with config.json, "
            "model.safetensors and tokenizer.json is needed"
        ) from None
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error


def _load(folder: Path, config: dict[str, Any], bare: bool) -> nn.Module:
    import torch
    import transformers

    names = config.get("architectures") or ["AutoModel"]
    factory = transformers.AutoModel if bare else getattr(transformers, names[0], None)
    if factory is None:
        raise UnsupportedModelError(f"{folder}: transformers knows no architecture {names[0]!r}")
    try:
        model, report = factory.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        kind = config.get("model_type")
        raise UnsupportedModelError(f"{folder}: model type {kind!r} cannot be loaded: {error}") from error
    _refuse_invented_weights(folder, model, sorted(report["missing_keys"]))
    return model.eval()


def _refuse_invented_weights(folder: Path, model: nn.Module, missing: list[str]) -> None:
    """Raise UnsupportedModelError for weights that transformers filled with random numbers, as the file lacks them.

    A pooler that was never saved is left out instead.
    """
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # type: ignore[assignment]
    elif missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UnsupportedModelError(f"{folder} has no weights for {', '.join(missing[:3])}{more} of its model")


def _stages(folder: Path) -> dict[str, Any] | None:
    """Return the arguments of `SentenceEncoder` that `modules.json` asks for; None without such a file."""
    if not (folder / "modules.json").exists():
        return None
    stages: dict[str, Any] = {"pooling": None, "normalize": False}
    for module in _read_json(folder / "modules.json", list):
        kind = str(module.get("type")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            stages["pooling"] = _pooling(_read_json(folder / module.get("path", "") / "config.json", dict), folder)
        elif kind == "Normalize":
            stages["normalize"] = True
        elif kind != "Transformer":
            raise UnsupportedModelError(f"{folder}: the sentence-transformers module {kind!r} is not supported")
    if stages["pooling"] is None:
        raise UnsupportedModelError(f"{folder}: modules.json has no Pooling module")
    return stages


def _pooling(config: dict[str, Any], folder: Path) -> str:
    if "pooling_mode" in config:  # the newer spelling
        modes = [config["pooling_mode"]] if isinstance(config["pooling_mode"], str) else list(config["pooling_mode"])
    else:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on
        ]
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise UnsupportedModelError(f"{folder}: pooling {modes} is not supported; mean and cls are")
    return names[modes[0]]


def _tokenizer(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    if path.exists():
        return _read_text(path)
    if not any(
        (folder / name).exists() for name in ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
    ):
        return None
    import transformers

    fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return fast.backend_tokenizer.to_str() if getattr(fast, "is_fast", False) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error


def _max_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    value = _read_json(path, dict).get("max_seq_length") if path.exists() else None
    return int(value) if value else None
