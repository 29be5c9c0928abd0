"""Read model folders, as Hugging Face and sentence-transformers write them: configuration, weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.options import DEFAULTS, ImportOptions
from turbo_tvm.frontends.sentence_modules import read_modules, with_pooled_prompts
from turbo_tvm.frontends.text_files import TextFiles, json_file, read_text_files
from turbo_tvm.frontends.torch.module import import_module
from turbo_tvm.frontends.torch.sentence import SentenceEncoder


@dataclass(frozen=True)
class Loaded:
    """What a folder holds."""

    module: nn.Module
    texts: TextFiles  # how texts become tokens, and the longest sequence


def import_folder(folder: Path, options: ImportOptions = DEFAULTS) -> Imported:
    """Import the model of a folder; name, longest sequence, tokenizer and prompts are the folder's by default.

    Raises UnsupportedModelError, as `load_folder` and `import_module` do.
    """
    loaded = load_folder(folder)
    return import_module(loaded.module, options.or_else(folder.resolve().name, loaded.texts))


def load_folder(folder: Path) -> Loaded:
    """Return a folder's model and what its files say of texts.

    A sentence-transformers folder becomes a `SentenceEncoder` with its pooling and what follows, or the cross-encoder
    that it is. Raises UnsupportedModelError for a folder that is not a model, a model type that transformers does not
    know, and modules and prompts that are not supported.
    """
    modules = read_modules(folder)
    place = folder if modules is None else modules.transformer
    config = json_file(place / "config.json", dict)
    pooled = modules is not None and bool(modules.pooling)
    model = _load(place, config, bare=pooled)
    texts = read_text_files(folder, place)
    if modules is None or not pooled:
        return Loaded(model, texts)
    model = SentenceEncoder(model, modules.pooling, modules.normalize, modules.then)
    return Loaded(model, with_pooled_prompts(texts, modules, folder))


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
