"""Read the folders of sentence-transformers: `modules.json`, and a folder for each module that has weights or settings.

What the modules compute is written in `torch/sentence.py` and `onnx/sentence.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.text_files import TextFiles, json_file, settings

# In the order in which sentence-transformers puts several poolings one after the other.
POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

_MODULES = "modules.json"
_LEGACY = {  # the older spelling: a switch per pooling
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
VECTOR = "sentence_embedding"  # what sentence-transformers calls the vector of a text
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(?:\w+\.)*(\w+)")
_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class DenseSpec:
    """A product with bias, an activation and perhaps a residual, of vectors."""

    weight: np.ndarray  # float32 (columns out, columns in)
    bias: np.ndarray | None  # float32 (columns out,)
    activation: str  # PyTorch's class of that name
    residual: np.ndarray | str | None = None  # float32 (columns out, columns in), "identity", or none


@dataclass(frozen=True)
class LayerNormSpec:
    """A normalisation of vectors to mean 0 and variance 1, scaled and shifted."""

    weight: np.ndarray  # float32 (columns,)
    bias: np.ndarray
    eps: float = _LAYER_NORM_EPS


@dataclass(frozen=True)
class SentenceModules:
    """What `modules.json` lists."""

    transformer: Path  # the folder of the encoder's configuration, weights and tokenizer
    pooling: tuple[str, ...]  # () for a cross-encoder, which is a transformer alone
    then: tuple[DenseSpec | LayerNormSpec, ...] = ()  # in order, before the normalisation
    normalize: bool = False
    pools_prompt: bool = True  # whether a prompt's tokens are pooled with the others


def read_modules(folder: Path) -> SentenceModules | None:
    """Read a folder; None without `modules.json`.

    Raises UnsupportedModelError for modules that are not supported, and for an order of them that is not.
    """
    if not (folder / _MODULES).exists():
        return None
    listed = [(_kind(module), folder / module.get("path", ""), module) for module in json_file(folder / _MODULES, list)]
    if not listed or listed[0][0] != "Transformer":
        raise UnsupportedModelError(f"{folder}: {_MODULES} does not begin with a Transformer module")
    pooling: tuple[str, ...] = ()
    pools_prompt, normalize = True, False
    then: list[DenseSpec | LayerNormSpec] = []
    for kind, place, _ in listed[1:]:
        if kind == "Pooling" and not pooling:
            config = settings(place / "config.json")
            pooling, pools_prompt = _pooling(config, folder), bool(config.get("include_prompt", True))
        elif kind == "Normalize" and pooling:
            normalize = True
        elif kind in _READ and pooling and not normalize:
            then.append(_READ[kind](place))
        elif kind != "Dropout":
            raise UnsupportedModelError(f"{folder}: the sentence-transformers module {kind!r} is not supported here")
    return SentenceModules(listed[0][1], pooling, tuple(then), normalize, pools_prompt)


def _kind(module: Any) -> str:
    return str(module.get("type")).rsplit(".", 1)[-1]


def _pooling(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        modes = [named] if isinstance(named, str) else list(named)
    else:
        modes = [mode for key, mode in _LEGACY.items() if config.get(key)] or ["mean"]
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    unknown = [mode for mode in modes if mode not in POOLING] or [key for key in on if key not in _LEGACY]
    if unknown or not modes:
        raise UnsupportedModelError(f"{folder}: pooling {unknown or modes} is not supported; {', '.join(POOLING)} are")
    return tuple(modes)


def with_pooled_prompts(texts: TextFiles, modules: SentenceModules, folder: Path) -> TextFiles:
    """Return what a folder says of texts, its pooling heeded.

    Raises UnsupportedModelError for a default prompt that is not pooled.
    """
    rule = replace(texts.rule, pools_prompt=modules.pools_prompt)
    if not rule.pools_prompt and rule.default_prompt and rule.prompts[rule.default_prompt]:
        raise UnsupportedModelError(
            f"{folder}: the default prompt {rule.default_prompt!r} is left out of the pooling (include_prompt), which "
            "is not supported"
        )
    return replace(texts, rule=rule)


def _dense(folder: Path) -> DenseSpec:
    config = settings(folder / "config.json")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, VECTOR):
            raise UnsupportedModelError(f"{folder}: a Dense module of {config[key]!r} is not supported")
    weights = _weights(folder)
    residual: np.ndarray | str | None = None
    if config.get("use_residual"):
        residual = weights.get("residual.weight", "identity")
    weight = _weight(weights, "linear.weight", folder)
    return DenseSpec(weight, weights.get("linear.bias"), _activation(config, folder), residual)


def _activation(config: dict[str, Any], folder: Path) -> str:
    """Return the class that sentence-transformers names by its path: torch.nn.modules.activation.Tanh."""
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    found = _ACTIVATION.fullmatch(name)
    if found is None:
        raise UnsupportedModelError(f"{folder}: the activation {name!r} is not one of PyTorch's")
    return found[1]


def _layer_norm(folder: Path) -> LayerNormSpec:
    weights = _weights(folder)
    return LayerNormSpec(_weight(weights, "norm.weight", folder), _weight(weights, "norm.bias", folder))


def _weight(weights: dict[str, np.ndarray], name: str, folder: Path) -> np.ndarray:
    if name not in weights:
        raise UnsupportedModelError(f"{folder} has no weight {name}; it has {', '.join(weights) or 'none'}")
    return weights[name]


def _weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the weights of a module's folder, float32, by name. Raises UnsupportedModelError."""
    try:
        if (folder / "model.safetensors").exists():
            from safetensors.numpy import load_file

            found = load_file(folder / "model.safetensors")
        else:
            import torch

            stored = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
            found = {name: value.to(torch.float32).numpy() for name, value in stored.items()}
    except Exception as error:  # whatever torch and safetensors raise
        raise UnsupportedModelError(f"the weights of {folder} cannot be read: {summary(error)}") from error
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


_READ: dict[str, Callable[[Path], DenseSpec | LayerNormSpec]] = {"Dense": _dense, "LayerNorm": _layer_norm}
