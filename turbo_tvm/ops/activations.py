"""Activation functions that kernels apply: their names, and the Relax operators that mean them.

What each computes is the function of the same name in `schedules/common/vector_math.py`.
"""

from __future__ import annotations

# By name; None for those that graphs spell out, which `passes/fuse_linear.py` and its like recognise.
ACTIVATIONS: dict[str, str | None] = {
    "gelu": "nn.gelu",
    "gelu_tanh": "nn.gelu_tanh",
    "quick_gelu": None,
    "relu": "nn.relu",
    "silu": "nn.silu",
    "tanh": "tanh",
}


def activation_of(operator: str) -> str | None:
    """Return the activation that a Relax operator means (named without "relax."), None if it is none."""
    return next((name for name, known in ACTIVATIONS.items() if known == operator), None)
