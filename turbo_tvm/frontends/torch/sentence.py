"""Sentence embedding models: an encoder, its pooling and what follows as one module.

The modules of sentence-transformers folders (`modules.json`), in plain PyTorch, so that the passes see them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.sentence_modules import POOLING, VECTOR, DenseSpec, LayerNormSpec


class SentenceEncoder(nn.Module):
    """One vector per sequence: token ids and mask, int64 (batch, length), give fp32 (batch, columns)."""

    def __init__(
        self,
        encoder: nn.Module,
        pooling: str | Sequence[str] = "mean",
        normalize: bool = False,
        then: Sequence[DenseSpec | LayerNormSpec] = (),
    ):
        """Wrap a Hugging Face encoder. Raises UnsupportedModelError for other pooling.

        pooling: one of POOLING, or several, whose vectors are put one after the other.
        normalize: whether every vector is divided by its Euclidean length at the end.
        then: what vectors, (batch, columns), go through between pooling and normalisation.
        """
        super().__init__()
        modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        if not modes or any(mode not in _POOL for mode in modes):
            raise UnsupportedModelError(f"pooling {pooling!r} is not supported; {', '.join(POOLING)} are")
        self.encoder = encoder
        self.pooling = modes
        self.then = nn.Sequential(*(_Dense(spec) if isinstance(spec, DenseSpec) else _norm(spec) for spec in then))
        self.normalize = normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the vectors by the name that sentence-transformers gives them."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)["last_hidden_state"]
        parts = [_POOL[mode](hidden, attention_mask) for mode in self.pooling]
        vectors = self.then(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        if self.normalize:
            vectors = nn.functional.normalize(vectors, p=2, dim=1)
        return {VECTOR: vectors}


class _Dense(nn.Module):
    def __init__(self, spec: DenseSpec):
        super().__init__()
        self.linear = _linear(spec.weight, spec.bias)
        kind = getattr(nn, spec.activation, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise UnsupportedModelError(f"PyTorch has no activation {spec.activation!r}")
        self.activation = kind()
        self.residual = None
        if spec.residual is not None:
            self.residual = nn.Identity() if isinstance(spec.residual, str) else _linear(spec.residual, None)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        made = self.activation(self.linear(vectors))
        return made if self.residual is None else made + self.residual(vectors)


def _linear(weight: np.ndarray, bias: np.ndarray | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.load_state_dict(
        {"weight": torch.from_numpy(weight), **({} if bias is None else {"bias": torch.from_numpy(bias)})}
    )
    return made


def _norm(spec: LayerNormSpec) -> nn.LayerNorm:
    made = nn.LayerNorm(len(spec.weight), spec.eps)
    made.load_state_dict({"weight": torch.from_numpy(spec.weight), "bias": torch.from_numpy(spec.bias)})
    return made


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(torch.float32)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _mean_of_square_root(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(torch.float32)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The n-th token has the weight n (SGPT)."""
    counted = mask.to(torch.float32)
    weights = (counted.cumsum(1) * counted).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).max(1).values


def _first(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the real tokens, which stand together, on either side of the padding."""
    counted = mask.to(torch.float32)
    is_last = ((counted.cumsum(1) == counted.sum(1, keepdim=True)) & (counted > 0)).unsqueeze(-1)
    return (hidden * is_last.to(torch.float32)).sum(1)


_POOL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_of_square_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
