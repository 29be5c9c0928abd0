"""A PyTorch model behind fixed inputs, so that it can be exported with symbolic batch and length.

A Hugging Face encoder, the module itself or one inside it, gets through a hook what its own code would compute in ways
that cannot be exported: its mask (as the additive 4-D mask that it accepts as it is), its position ids and its token
types. DeBERTa gets its relative positions instead of a mask, which it reads in its own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from turbo_tvm.artifact.manifest import PositionRule
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.torch.relative_positions import relative_encoder_of, relative_positions_of
from turbo_tvm.runtime.batch import position_ids

MASKED = -1e9  # added to the scores of masked keys
SLIDING = "sliding_attention"  # what transformers calls layers with a window
_BATCH, _LENGTH = 2, 7  # the example that is traced: sizes of 1 would be taken for constants


class FixedInputs(nn.Module):
    """Fixes a model's inputs to `names`, in order, and its outputs to a tuple of tensors.

    causal: a token sees those before it only, as in CLIP's text encoder. longest: the longest sequence, in tokens;
    relative positions are tabulated up to it.
    """

    def __init__(self, model: nn.Module, positions: PositionRule, causal: bool = False, longest: int = 0):
        super().__init__()
        self.model = model
        self.encoder = encoder_of(model)
        self.relative = relative_positions_of(model, max(longest, _LENGTH))
        self.positions = positions
        self.causal = causal
        self.names = _fixed_names(model, positions)
        self._given: dict[str, torch.Tensor] = {}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*inputs).values())

    def named(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's outputs by name."""
        self._given = dict(zip(self.names, inputs, strict=True))
        accepted = {name: self._given[name] for name in self.names if name in input_names_of(self.model)}
        accepted.pop("position_ids", None)
        if self.encoder is None:
            return tensors_of(self.model(**accepted))
        handles = [self.encoder.register_forward_pre_hook(self._complete, with_kwargs=True)]
        relative_encoder = relative_encoder_of(self.model)
        if relative_encoder is not None and self.relative is not None:
            handles.append(relative_encoder.register_forward_pre_hook(self.relative.give, with_kwargs=True))
        try:
            return tensors_of(self.model(**accepted))
        finally:
            for handle in handles:
                handle.remove()

    def _complete(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give the encoder what it would otherwise compute itself."""
        call = dict(inspect.signature(encoder.forward).bind(*args, **kwargs).arguments)
        call.update(call.pop("kwargs", {}))
        mask = call.get("attention_mask")
        reads_masks = relative_encoder_of(self.model) is None
        if reads_masks and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            call["attention_mask"] = _additive_masks(mask, sliding_window(encoder), self.causal)
        for name in ("token_type_ids", "position_ids"):
            if call.get(name) is None and name in self._given:
                call[name] = self._given[name]
        return (), call

    def example(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Inputs for these token ids; without a mask all of them are real."""
        mask = torch.ones_like(ids) if mask is None else mask
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        if "position_ids" in self.names:
            rows = [position_ids(self.positions, row) for row in ids.numpy()]
            given["position_ids"] = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tuple(given[name] for name in self.names)

    @torch.inference_mode()
    def output_names(self) -> tuple[str, ...]:
        """The names of the model's outputs, in order."""
        return tuple(self.named(*self.example(sample_ids(self.model))))


def _additive_masks(mask: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask, added to scores, and of later tokens if it is causal.

    By the kind of layer for a model some of whose layers see no farther than a window.
    """
    keys = (1.0 - mask.to(torch.float32))[:, None, None, :] * MASKED
    places = torch.arange(mask.shape[1])
    distance = places[None, :] - places[:, None]
    if causal:
        keys = keys + (distance > 0).to(torch.float32) * MASKED
    if window is None:
        return keys
    far = (distance.abs() > window).to(torch.float32) * MASKED
    return {"full_attention": keys, SLIDING: keys + far[None, None]}


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    """A model's output as named tensors; caches and missing parts are left out."""
    if isinstance(output, torch.Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        items = dict(output)
    elif isinstance(output, tuple | list):
        items = {f"output_{i}": value for i, value in enumerate(output)}
    else:
        raise UnsupportedModelError(f"the model returns {type(output).__name__}; a tensor, tuple or mapping is needed")
    return {name: value for name, value in items.items() if isinstance(value, torch.Tensor)}


def input_names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's inputs."""
    return tuple(inspect.signature(model.forward).parameters)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The Hugging Face model that this is, or the first one inside it, without its head."""
    found = next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)
    return found.base_model if found is not None else None


def config_of(model: nn.Module) -> Any:
    """The configuration of the Hugging Face model that this is or holds."""
    return getattr(encoder_of(model), "config", None)


def sliding_window(model: nn.Module) -> int | None:
    """How far some of the layers see, in tokens to either side; None if all of them see everything."""
    config = config_of(model)
    window = getattr(config, "sliding_window", None)
    return int(window) if window is not None and SLIDING in (getattr(config, "layer_types", None) or ()) else None


def _fixed_names(model: nn.Module, positions: PositionRule) -> tuple[str, ...]:
    names = ["input_ids", "attention_mask"]
    if type_vocab_size(model):
        names.append("token_type_ids")
    if positions.kind != "none":
        names.append("position_ids")
    return tuple(names)


def type_vocab_size(model: nn.Module) -> int:
    """How many token types the model knows; 0 where it takes none."""
    encoder = encoder_of(model)
    takes = encoder is not None and "token_type_ids" in input_names_of(encoder)
    return int(getattr(config_of(model), "type_vocab_size", 0) or 0) if takes else 0


def vocab_size(model: nn.Module) -> int:
    """How many token ids the model's own embedding has rows for."""
    find: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    table = find() if callable(find) else None
    if not isinstance(table, nn.Embedding):
        table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding (torch.nn.Embedding)")
    return int(table.num_embeddings)


def sample_ids(model: nn.Module) -> torch.Tensor:
    """Token ids with the pad id, if there is one, in the middle: what the position rules differ in.

    The largest id and that of the end of a text, which may be pooled, are among the first, which `sample_mask` keeps.
    Longer than a window, if the model has one: inside of it all layers see all tokens.
    """
    vocabulary = vocab_size(model)
    length = _LENGTH + (sliding_window(model) or 0)
    ids = torch.randint(0, vocabulary, (_BATCH, length), generator=torch.Generator().manual_seed(0))
    ids[:, 1] = vocabulary - 1
    for column, name in ((2, "pad_token_id"), (3, "eos_token_id")):
        token = getattr(config_of(model), name, None)
        if isinstance(token, int) and 0 <= token < vocabulary:
            ids[:, column] = token
    return ids


def sample_mask(ids: torch.Tensor) -> torch.Tensor:
    """A mask for the sample: the second sequence ends earlier."""
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return mask
