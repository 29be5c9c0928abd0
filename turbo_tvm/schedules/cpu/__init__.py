"""CPU schedules: one kernel family per file."""

from turbo_tvm.schedules.cpu import (
    attention,
    attention_amx,
    distances,
    embedding,
    gate,
    linear,
    linear_amx,
    normalization,
    pooling,
    rotary,
    rows,
)

__all__ = [
    "attention",
    "attention_amx",
    "distances",
    "embedding",
    "gate",
    "linear",
    "linear_amx",
    "normalization",
    "pooling",
    "rotary",
    "rows",
]
