"""Read the files of a model folder that say how texts become tokens, for PyTorch's folders and those of ONNX files.

`tokenizer.json` does not say it alone: `tokenizer_config.json` has casing, added tokens, the longest sequence and the
end that is cut; sentence-transformers has files of its own. The ids are those of transformers' `AutoTokenizer`, which
is asked where transformers is installed; elsewhere the same settings are applied to `tokenizer.json` here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from turbo_tvm.artifact.manifest import TextRule
from turbo_tvm.errors import UnsupportedModelError, summary

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_PROMPTS = "config_sentence_transformers.json"
# sentence-transformers named the file after the model's type once.
_SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_NO_LIMIT = 1_000_000_000  # tokens; transformers writes 1e30 for a tokenizer that names none
_TYPES = "token_type_ids"
_TYPED_CLASSES = ("Bert", "ConvBert", "DebertaV2", "Electra", "LayoutLM", "MobileBert", "SqueezeBert")


@dataclass(frozen=True)
class TextFiles:
    """What the files say."""

    tokenizer: str | None = None  # the text of a `tokenizer.json` that gives the ids of all files together
    longest: int | None = None  # sequence in tokens, if a file names one; the model may take less
    rule: TextRule = TextRule()


def read_text_files(folder: Path, transformer: Path | None = None) -> TextFiles:
    """Read a folder. Raises UnsupportedModelError for what cannot be read or cannot be followed, naming the file.

    transformer: the folder of configuration and tokenizer, if sentence-transformers put them into one of their own.
    """
    transformer = transformer or folder
    sentence = _sentence_config(transformer)
    found = _by_transformers(transformer) or _by_hand(transformer)
    tokenizer = found.tokenizer
    if tokenizer is not None and sentence.get("do_lower_case"):
        tokenizer = lowercased(tokenizer)
    longest = _tokens(sentence.get("max_seq_length")) or found.longest
    return TextFiles(tokenizer, longest, _with_prompts(found.rule, folder / _PROMPTS))


def rule_of(tokenizer: str) -> TextRule:
    """Return the rule of a `tokenizer.json` by itself."""
    truncation = json.loads(tokenizer).get("truncation") or {}
    return TextRule(cut="left" if truncation.get("direction") == "Left" else "right")


def lowercased(tokenizer: str) -> str:
    """Return the text of a `tokenizer.json` that lowers texts before anything else, unless it does already."""
    values = json.loads(tokenizer)
    normalizer = values.get("normalizer")
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if any(part["type"] == "Lowercase" or (part["type"] == "BertNormalizer" and part["lowercase"]) for part in parts):
        return tokenizer
    values["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *parts]}
    return json.dumps(values, ensure_ascii=False)


def settings(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} without the file. Raises UnsupportedModelError."""
    return json_file(path, dict) if path.exists() else {}


def json_file(path: Path, kind: type) -> Any:
    """Return what a JSON file holds, a `dict` or a `list`. Raises UnsupportedModelError."""
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


def _sentence_config(folder: Path) -> dict[str, Any]:
    return next((settings(folder / name) for name in _SENTENCE_CONFIGS if (folder / name).exists()), {})


def _by_transformers(folder: Path) -> TextFiles | None:
    """Return what `AutoTokenizer` makes of a folder; None without transformers, and where it makes nothing of it."""
    names = (_TOKENIZER, *_VOCABULARIES)
    if not any((folder / name).exists() for name in names):
        return TextFiles()
    try:
        import transformers
    except ImportError:
        return None
    try:
        made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its classes raise
        if (folder / _TOKENIZER).exists():
            return None
        raise UnsupportedModelError(f"the tokenizer of {folder} cannot be read: {summary(error)}") from error
    if not made.is_fast:
        return TextFiles()
    cut: Literal["left", "right"] = "left" if made.truncation_side == "left" else "right"
    rule = TextRule(cut, token_types=_TYPES in made.model_input_names)
    return TextFiles(made.backend_tokenizer.to_str(), _tokens(made.model_max_length), rule)


def _by_hand(folder: Path) -> TextFiles:
    """Return what the files say, as transformers reads them, for folders that have a `tokenizer.json`."""
    path = folder / _TOKENIZER
    if not path.exists():
        return TextFiles()
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        known = {token["content"] for token in values.get("added_tokens", [])} | set(values["model"].get("vocab", ()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {summary(error)}") from error
    config = settings(folder / _TOKENIZER_CONFIG)
    added = [token.get("content") for token in config.get("added_tokens_decoder", {}).values()]
    if lacking := [token for token in added if token not in known]:
        raise UnsupportedModelError(
            f"{folder / _TOKENIZER_CONFIG} adds tokens that {_TOKENIZER} lacks, such as {lacking[0]!r}: install "
            "transformers, which reads them"
        )
    _set_casing(values, config)
    rule = rule_of(text)
    if config.get("truncation_side") in ("left", "right"):
        rule = replace(rule, cut=config["truncation_side"])
    rule = replace(rule, token_types=_takes_types(config))
    return TextFiles(json.dumps(values, ensure_ascii=False), _tokens(config.get("model_max_length")), rule)


def _takes_types(config: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer hands token types on: as its configuration or its class says, else it does."""
    if "model_input_names" in config:
        return _TYPES in config["model_input_names"]
    named = config.get("tokenizer_class")
    return named is None or str(named).removesuffix("Fast").removesuffix("Tokenizer") in _TYPED_CLASSES


def _set_casing(values: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Let BERT's normaliser do what `tokenizer_config.json` says of it."""
    normalizer = values.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        named = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
        normalizer.update({field: config[key] for key, field in named.items() if key in config})


def _with_prompts(rule: TextRule, path: Path) -> TextRule:
    values = settings(path)
    prompts, default = values.get("prompts") or {}, values.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise UnsupportedModelError(f"{path}: prompts is to be an object of texts by name, not {prompts!r}")
    if default is not None and default not in prompts:
        raise UnsupportedModelError(f"{path}: default_prompt_name is {default!r}; there are {', '.join(prompts)}")
    return replace(rule, prompts=prompts, default_prompt=default)


def _tokens(value: Any) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 < value < _NO_LIMIT
    return value if usable else None
