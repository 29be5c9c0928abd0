"""Tabulate DeBERTa's relative positions over distances.

Its own code takes logarithms of distances in a way that TVM's importer reads as integers, and that another logarithm
would round to another bucket. Computed here once, the buckets are PyTorch's own, and a constant of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RelativePositions(nn.Module):
    """The positions that an encoder with `get_rel_pos` derives from the distance i - j, for up to `longest` tokens."""

    table: torch.Tensor  # int64 (2 * longest - 1,): by distance, from 1 - longest on

    def __init__(self, square: torch.Tensor):
        """square: what the encoder itself derives, int64 (longest, longest)."""
        super().__init__()
        self.longest = len(square)
        self.register_buffer("table", torch.cat([square[0, 1:].flip(0), square[:, 0]]), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return positions, int64 (1, length, length), for rows (batch, length, columns)."""
        index = torch.arange(hidden_states.shape[1])
        return self.table[index[:, None] - index[None, :] + self.longest - 1][None]

    def give(self, _encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Give the encoder its positions, as a forward pre-hook of it."""
        return args, kwargs | {"relative_pos": self(args[0])}


def relative_encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the part of a model that can be given relative positions; None without one."""
    return next((part for part in model.modules() if hasattr(part, "get_rel_pos")), None)


def relative_positions_of(model: nn.Module, longest: int) -> RelativePositions | None:
    """Return the positions that a model makes itself, for up to `longest` tokens; None if it makes none."""
    encoder: Any = relative_encoder_of(model)
    positions = encoder.get_rel_pos(torch.zeros(1, longest, 1)) if encoder is not None else None
    return None if positions is None else RelativePositions(positions[0])
