"""DeBERTa's relative positions as a table over distances.

Its own code takes logarithms of distances in a way that TVM's importer reads as integers, and that another logarithm
would round to another bucket. Computed here once, the buckets are PyTorch's own, and a constant of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RelativePositions(nn.Module):
    """The positions that an encoder with `get_rel_pos` derives from the distance i - j, for up to `longest` tokens."""

    table: torch.Tensor

    def __init__(self, encoder: nn.Module, longest: int):
        super().__init__()
        square = _square(encoder, longest)
        assert square is not None
        self.longest = longest
        self.register_buffer("table", torch.cat([square[0, 1:].flip(0), square[:, 0]]), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """int64 (1, length, length) for rows (batch, length, columns)."""
        index = torch.arange(hidden_states.shape[1])
        return self.table[index[:, None] - index[None, :] + self.longest - 1][None]

    def complete(self, _encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A forward pre-hook of the encoder: give it the positions."""
        return args, kwargs | {"relative_pos": self(args[0])}


def relative_encoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a model that attends by relative positions, and can be given them."""
    found = (part for part in model.modules() if hasattr(part, "get_rel_pos"))
    return next((part for part in found if _square(part, 2) is not None), None)


def _square(encoder: Any, length: int) -> torch.Tensor | None:
    """The encoder's own positions, int64 (length, length); None without relative attention."""
    positions = encoder.get_rel_pos(torch.zeros(1, length, 1))
    return None if positions is None else positions[0]
