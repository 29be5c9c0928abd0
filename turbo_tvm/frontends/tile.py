"""Repeat a tensor along its axes, by counts that may be symbolic: for both importers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax

from turbo_tvm.passes.rewriter import shape_of


def tile(emit: Callable[[relax.Expr], relax.Var], x: relax.Expr, counts: Sequence[Any]) -> relax.Var:
    """Return x repeated counts[i] times along axis i, as NumPy's tile does; x has at most as many axes as counts.

    emit: binds an expression in the function that is being built.
    """
    shape = [1] * (len(counts) - len(shape_of(x))) + shape_of(x)
    pairs = list(zip(counts, shape, strict=True))
    apart = emit(relax.op.reshape(x, [d for size in shape for d in (1, size)]))
    wide = emit(relax.op.broadcast_to(apart, [d for pair in pairs for d in pair]))
    return emit(relax.op.reshape(wide, [count * size for count, size in pairs]))
