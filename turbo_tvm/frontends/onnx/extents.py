"""Shapes as products of numbers and symbolic dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import Expr


def product(values: Sequence[Any]) -> Any:
    """Return the product of numbers and symbolic integers; 1 of none."""
    return reduce(lambda a, b: a * b, values, 1)


def factors(values: Sequence[Any]) -> tuple[int, list[Expr]]:
    """Return the product of `values` as a number and its symbolic factors."""
    number, symbols, pending = 1, [], list(values)
    while pending:
        x = pending.pop()
        if isinstance(x, int | np.integer):
            number *= int(x)
        elif isinstance(x, tirx.IntImm):
            number *= int(x.value)
        elif isinstance(x, tirx.Mul):
            pending += [x.a, x.b]
        else:
            symbols.append(x)
    return number, symbols


def broadcast(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    """Return the shape that both broadcast to, by NumPy's rule; a symbolic dimension is taken to be the larger one."""
    rank = max(len(left), len(right))
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in (left, right)]
    return [b if isinstance(a, int) and a == 1 else a for a, b in zip(*padded, strict=True)]
