"""What every frontend returns: a Relax module and what must be known to feed it."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import ir

from turbo_tvm.runtime.manifest import Bounds, PositionRule


@dataclass(frozen=True)
class Imported:
    """A model as a Relax module with symbolic batch and length.

    mod: `main(inputs..., weights...)`, inputs `(batch, length)` int64 and named input_ids, attention_mask,
        token_type_ids, position_ids (those that the model takes).
    weights: the values of `main`'s weight parameters, in order.
    output_names: one per output of `main`.
    tokenizer: the text of a `tokenizer.json`, if the model came with one.
    """

    name: str
    model_type: str
    mod: ir.IRModule
    weights: list[tvm.runtime.Tensor]
    output_names: tuple[str, ...]
    bounds: Bounds
    positions: PositionRule
    parameter_count: int
    tokenizer: str | None = None
