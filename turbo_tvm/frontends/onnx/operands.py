"""What converters of ONNX operators share: their types, and how they read a node's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax

if TYPE_CHECKING:
    from turbo_tvm.frontends.onnx.graph import OnnxGraph

Results = Sequence[Any] | None  # of a node, in order; None leaves the node to TVM
Attributes = Mapping[str, Any]  # of a node, by name
Operator = Callable[["OnnxGraph", list[Any], Attributes], Results]


def operands(graph: OnnxGraph, inputs: list[Any], count: int) -> list[Any]:
    """Return the first `count` inputs as expressions, None for those that are missing."""
    given = [None if x is None else graph.expression(x) for x in inputs]
    return given + [None] * (count - len(given))


def add_all(graph: OnnxGraph, *terms: relax.Expr | None) -> relax.Expr:
    """Return the sum of the terms that are there."""
    present = [t for t in terms if t is not None]
    total = present[0]
    for term in present[1:]:
        total = graph.emit(relax.op.add(total, term))
    return total
