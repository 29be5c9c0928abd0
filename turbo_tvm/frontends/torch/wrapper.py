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
from turbo_tvm.ops.inputs import InputKind
from turbo_tvm.runtime.batch import position_ids

MASKED = -1e9  # added to the scores of masked keys
SLIDING = "sliding_attention"  # what transformers calls layers with a window
_BATCH, _LENGTH = 2, 7  # the example that is traced: sizes of 1 would be taken for constants


class FixedInputs(nn.Module):
    """Fixes a model's inputs to `kinds`, in order, all int64 (batch, length), and its outputs to a tuple of tensors."""

    def __init__(self, model: nn.Module, positions: PositionRule, causal: bool = False, longest: int = 0):
        """Wrap a model.

        positions: how its position ids follow from token ids.
        causal: whether a token sees those before it only, as in CLIP's text encoder.
        longest: the longest sequence, in tokens; relative positions are tabulated up to it.
        """
        super().__init__()
        self.model = model
        self.encoder = encoder_of(model)
        self.relative = relative_positions_of(model, max(longest, _LENGTH))
        self.positions = positions
        self.causal = causal
        self.kinds = _fixed_kinds(model, positions)
        self._given: dict[InputKind, torch.Tensor] = {}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the model's outputs, in order."""
        return tuple(self.named(*inputs).values())

    def named(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's outputs, by name."""
        self._given = dict(zip(self.kinds, inputs, strict=True))
        offered = {kind.parameter: x for kind, x in self._given.items() if kind is not InputKind.POSITION_IDS}
        accepted = {name: x for name, x in offered.items() if name in parameters_of(self.model)}
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
        name = InputKind.ATTENTION_MASK.parameter
        mask = call.get(name)
        reads_masks = relative_encoder_of(self.model) is None
        if reads_masks and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            call[name] = _additive_masks(mask, sliding_window(encoder), self.causal)
        for kind in (InputKind.TOKEN_TYPE_IDS, InputKind.POSITION_IDS):
            if call.get(kind.parameter) is None and kind in self._given:
                call[kind.parameter] = self._given[kind]
        return (), call

    def example(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Return inputs for token ids, int64 (batch, length); without a mask all of them are real."""
        mask = torch.ones_like(ids) if mask is None else mask
        given = {
            InputKind.TOKEN_IDS: ids,
            InputKind.ATTENTION_MASK: mask,
            InputKind.TOKEN_TYPE_IDS: torch.zeros_like(ids),
        }
        if InputKind.POSITION_IDS in self.kinds:
            rows = [position_ids(self.positions, row) for row in ids.numpy()]
            given[InputKind.POSITION_IDS] = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tuple(given[kind] for kind in self.kinds)

    @torch.inference_mode()
    def output_names(self) -> tuple[str, ...]:
        """Return the names of the model's outputs, in order."""
        return tuple(self.named(*self.example(sample_ids(self.model))))


def _additive_masks(mask: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return what is added to scores: MASKED at padding, and at later tokens if the mask is causal.

    mask: (batch, length), 1 for tokens. The result is fp32 (batch, 1, 1 or length, length); one by kind of layer for a
    model some of whose layers see no farther than a window.
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
    """Return a model's output as named tensors; caches and missing parts are left out.

    Raises UnsupportedModelError for what is no tensor, tuple or mapping.
    """
    if isinstance(output, torch.Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        items = dict(output)
    elif isinstance(output, tuple | list):
        items = {f"output_{i}": value for i, value in enumerate(output)}
    else:
        raise UnsupportedModelError(f"the model returns {type(output).__name__}; a tensor, tuple or mapping is needed")
    return {name: value for name, value in items.items() if isinstance(value, torch.Tensor)}


def parameters_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what the model's `forward` takes."""
    return tuple(inspect.signature(model.forward).parameters)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the Hugging Face model that this is, or the first one inside it, without its head; None without one."""
    found = next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)
    return found.base_model if found is not None else None


def config_of(model: nn.Module) -> Any:
    """Return the configuration of the Hugging Face model that this is or holds; None without one."""
    return getattr(encoder_of(model), "config", None)


def sliding_window(model: nn.Module) -> int | None:
    """Return how far some of the layers see, in tokens to either side; None if all of them see everything."""
    config = config_of(model)
    window = getattr(config, "sliding_window", None)
    return int(window) if window is not None and SLIDING in (getattr(config, "layer_types", None) or ()) else None


def _fixed_kinds(model: nn.Module, positions: PositionRule) -> tuple[InputKind, ...]:
    kinds = [InputKind.TOKEN_IDS, InputKind.ATTENTION_MASK]
    if type_vocab_size(model):
        kinds.append(InputKind.TOKEN_TYPE_IDS)
    if positions.kind != "none":
        kinds.append(InputKind.POSITION_IDS)
    return tuple(kinds)


def type_vocab_size(model: nn.Module) -> int:
    """Return how many token types the model knows; 0 where it takes none."""
    encoder = encoder_of(model)
    takes = encoder is not None and InputKind.TOKEN_TYPE_IDS.parameter in parameters_of(encoder)
    return int(getattr(config_of(model), "type_vocab_size", 0) or 0) if takes else 0


def vocab_size(model: nn.Module) -> int:
    """Return how many token ids the model's own embedding has rows for. Raises UnsupportedModelError without one."""
    find: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    table = find() if callable(find) else None
    if not isinstance(table, nn.Embedding):
        table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding (torch.nn.Embedding)")
    return int(table.num_embeddings)


def sample_ids(model: nn.Module) -> torch.Tensor:
    """Return token ids, int64 (2, length), with the pad id, if any, in the middle: where position rules differ.

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
    """Return a mask for the sample, int64 (2, length): the second sequence ends earlier."""
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return mask
