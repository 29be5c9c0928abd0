"""Sentence embedding models: an encoder, its pooling and its normalisation as one module.

The pooling of sentence-transformers folders (`modules.json`), in plain PyTorch, so that the passes see it.
"""

from __future__ import annotations

import torch
from torch import nn

from turbo_tvm.errors import UnsupportedModelError

POOLING = ("mean", "cls")


class SentenceEncoder(nn.Module):
    """One vector per sequence: token ids and mask, int64 (batch, length), give fp32 (batch, hidden)."""

    def __init__(self, encoder: nn.Module, pooling: str = "mean", normalize: bool = False):
        """Wrap a Hugging Face encoder. Raises UnsupportedModelError for other pooling.

        pooling: "mean" over the tokens under the mask, or "cls", the first token.
        normalize: whether every vector is divided by its Euclidean length.
        """
        super().__init__()
        if pooling not in POOLING:
            raise UnsupportedModelError(f"pooling {pooling!r} is not supported; {' and '.join(POOLING)} are")
        self.encoder = encoder
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the vectors by the name that sentence-transformers gives them."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)["last_hidden_state"]
        vectors = hidden[:, 0] if self.pooling == "cls" else _mean(hidden, attention_mask)
        if self.normalize:
            vectors = nn.functional.normalize(vectors, p=2, dim=1)
        return {"sentence_embedding": vectors}


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(torch.float32)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
