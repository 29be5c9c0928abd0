"""Rules of ONNX operators on values with symbolic integers.

A rule takes the evaluator, the node's inputs and its attributes, and returns the result, simplified or not, or None if
that cannot be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper
from tvm import tirx

from turbo_tvm.frontends.onnx.extents import product

if TYPE_CHECKING:
    from turbo_tvm.frontends.onnx.values import Values

Inputs = Sequence[Any]
Attributes = Mapping[str, Any]
Rule = Callable[["Values", Inputs, Attributes], "np.ndarray | None"]


def _numbers(values: np.ndarray | None) -> list[int] | None:
    """Return plain integers, or None if there are others."""
    return None if values is None or values.dtype == object else [int(x) for x in values.reshape(-1)]


def _axes(inputs: Inputs, attrs: Attributes) -> list[int] | None:
    """Return the axes, which later opsets take as an input; None if there are none."""
    if "axes" in attrs:
        return [int(a) for a in attrs["axes"]]
    return _numbers(inputs[1]) if len(inputs) > 1 else None


def _elementwise(apply: Callable[[Any, Any], Any]) -> Rule:
    def rule(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray:
        return reduce(np.frompyfunc(apply, 2, 1), [_plain(x) for x in inputs])

    return rule


def _plain(values: np.ndarray) -> np.ndarray:
    """Return elements as Python's integers, which TVM's expressions take."""
    done = np.empty(values.shape, object)
    flat = [x if values.dtype == object else x.item() for x in values.reshape(-1)]
    done.reshape(-1)[:] = flat
    return done


def _comparison(holds: Callable[[Any, Any], Any], opposite: Callable[[Any, Any], Any]) -> Rule:
    def rule(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
        left, right = np.broadcast_arrays(*(_plain(x) for x in inputs))
        found = [values.compare(holds, opposite, a, b) for a, b in zip(left.flat, right.flat, strict=True)]
        return None if None in found else np.array(found, bool).reshape(left.shape)

    return rule


def _same(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray:
    return inputs[0]


def _cast(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    dtype = helper.tensor_dtype_to_np_dtype(attrs["to"])
    return inputs[0] if np.issubdtype(dtype, np.integer) else None


def _gather(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    data, index = inputs
    return None if index.dtype == object else np.take(data, index, axis=attrs.get("axis", 0))


def _slice(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    starts, ends, axes, steps = ([_numbers(x) for x in inputs[1:]] + [None] * 2)[:4]
    if starts is None or ends is None:
        return None
    index = [slice(None)] * inputs[0].ndim
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        index[axis] = slice(starts[i], ends[i], steps[i] if steps is not None else 1)
    return inputs[0][tuple(index)]


def _concat(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray:
    return np.concatenate([_plain(x) for x in inputs], axis=attrs["axis"])


def _unsqueeze(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    axes = _axes(inputs, attrs)
    return None if axes is None else np.expand_dims(inputs[0], tuple(axes))


def _squeeze(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    axes = _axes(inputs, attrs)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _reshape(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    shape = _numbers(inputs[1])
    return None if shape is None else inputs[0].reshape(shape)


def _expand(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    shape = _numbers(inputs[1])
    return None if shape is None else inputs[0] * np.ones(shape, np.int64)


def _where(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    condition, yes, no = inputs
    return None if condition.dtype == object else np.where(condition, _plain(yes), _plain(no))


def _reduce_prod(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray | None:
    if _axes(inputs, attrs) not in (None, [0]) or inputs[0].ndim != 1:
        return None
    keep = attrs.get("keepdims", 1)
    return np.array(product(list(inputs[0].reshape(-1))), object).reshape((1,) * inputs[0].ndim if keep else ())


def _divide(a: Any, b: Any) -> Any:
    """Divide sizes: neither is negative."""
    return a // b


# Rules by operator, of ONNX's own domain.
RULES: dict[str, Rule] = {
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "Where": _where,
    "ReduceProd": _reduce_prod,
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(lambda a, b: a % b),
    "Max": _elementwise(lambda a, b: max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(a, b)),
    "Min": _elementwise(lambda a, b: min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(a, b)),
    "Equal": _comparison(lambda a, b: a == b, lambda a, b: a != b),
    "Less": _comparison(lambda a, b: a < b, lambda a, b: a >= b),
    "LessOrEqual": _comparison(lambda a, b: a <= b, lambda a, b: a > b),
    "Greater": _comparison(lambda a, b: a > b, lambda a, b: a <= b),
    "GreaterOrEqual": _comparison(lambda a, b: a >= b, lambda a, b: a < b),
}
