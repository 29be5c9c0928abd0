"""Take an exported program apart into operators that TVM's importer knows, if it is not made of such already.

PyTorch traces a whole model again to do that, which takes longer than exporting it. BERT and its relatives need it for
a few operators only, and those the importer reads as they are: such a program stays as it was exported. Any other is
taken apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Operators that are not taken apart: passes recognise them whole.
_KEPT_WHOLE = ("scaled_dot_product_attention", "linear", "layer_norm", "gelu", "matmul", "softmax")

# What PyTorch would leave as it is.
_BASIC = (
    "_assert_tensor_metadata.default",
    "add.Tensor",
    "embedding.default",
    "gelu.default",
    "layer_norm.default",
    "linear.default",
    "mul.Tensor",
    "scaled_dot_product_attention.default",
    "select.int",
    "sub.Tensor",
    "sym_size.int",
    "tanh.default",
    "unsqueeze.default",
    "view.default",
)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program in operators that TVM's importer reads as PyTorch means them."""
    if all(_is_readable(node) for node in program.graph.nodes if node.op == "call_function"):
        return program
    table = torch.export.default_decompositions()
    for op in list(table):
        if str(op).split(".")[1] in _KEPT_WHOLE:  # "aten.linear.default"
            table.pop(op)
    return program.run_decompositions(table)


def _is_readable(node: torch.fx.Node) -> bool:
    name = str(node.target).removeprefix("aten.")
    return name in _BASIC or (name in _READABLE and _READABLE[name](node))


def _is_idle(dropout: torch.fx.Node) -> bool:
    """Return whether this is no dropout but the identity; the importer takes each of them for that."""
    return len(dropout.args) == 3 and dropout.args[2] is False


def _is_plain_subtraction(rsub: torch.fx.Node) -> bool:
    """Return whether this is a scalar less x, in fp32: the importer overlooks a factor, and types by the scalar."""
    x, scalar = rsub.args[0], rsub.args[1]
    return len(rsub.args) == 2 and not rsub.kwargs and isinstance(scalar, float) and _dtype(x) == torch.float32


def _is_plain_cast(to: torch.fx.Node) -> bool:
    """Return whether a dtype is all that is given; with more, the importer overlooks the dtype."""
    return len(to.args) == 2 and not to.kwargs


def _any(_node: torch.fx.Node) -> bool:
    return True


def _dtype(node: Any) -> torch.dtype:
    return node.meta["val"].dtype


# What PyTorch would take apart, and when the importer reads it as it is.
_READABLE: dict[str, Callable[[torch.fx.Node], bool]] = {
    "arange.default": _any,
    "dropout.default": _is_idle,
    "reshape.default": _any,
    "rsub.Scalar": _is_plain_subtraction,
    "to.dtype": _is_plain_cast,
    "transpose.int": _any,
}
