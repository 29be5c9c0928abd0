"""What an ONNX graph computes from shapes and constants alone, evaluated while it is imported.

Exporters spell a reshape as a dozen nodes that take shapes apart and put them together again. Their values are known
when the graph is read: numbers, or integers in the symbolic batch and length. A value is a NumPy array; of dtype object
if it holds symbolic integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import ir, tirx
from tvm.ir import Expr
from tvm.sym.analyzer import Analyzer

MAX_ELEMENTS = 1 << 20  # larger results are left to the compiled code

Binary = Callable[[Any, Any], Any]

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


class Values:
    """Evaluates nodes; `dims` are the symbolic dimensions, each at least 1."""

    def __init__(self, dims: Iterable[tirx.Var], opset: int):
        self.opset = opset
        self._analyzer = Analyzer()
        for dim in dims:
            self._analyzer.bind(dim, ir.Range(1, 1 << 30))

    def evaluate(
        self, node: onnx.NodeProto, inputs: Sequence[np.ndarray | None], attrs: Mapping[str, Any]
    ) -> list[np.ndarray] | None:
        """The node's results, or None if they cannot be known (yet)."""
        if node.op_type in _RANDOM or node.domain not in ("", "ai.onnx"):
            return None
        if any(x is not None and x.dtype == object for x in inputs):
            rule = _RULES.get(node.op_type)
            found = rule(self, inputs, attrs) if rule is not None else None
            return None if found is None else [self.tidy(found)]
        return self._run(node, inputs)

    def _run(self, node: onnx.NodeProto, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
        """A node on numbers, by ONNX's own reference."""
        from onnx.reference import ReferenceEvaluator

        given = dict(zip(node.input, inputs, strict=True))
        named = {name: x for name, x in given.items() if x is not None}
        described = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in named.items()
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = helper.make_graph([node], "node", described, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            found = [np.asarray(x) for x in ReferenceEvaluator(model).run(None, named)]
        except Exception:  # what the reference lacks, the importer may know
            return None
        return found if all(x.size <= MAX_ELEMENTS for x in found) else None

    def tidy(self, values: np.ndarray) -> np.ndarray:
        """Simplified; int64 if no element is symbolic."""
        values = np.asarray(values, object)
        flat = [self.simplify(x) for x in values.reshape(-1)]
        if all(isinstance(x, int) for x in flat):
            return np.array(flat, np.int64).reshape(values.shape)
        done = np.empty(len(flat), object)
        done[:] = flat
        return done.reshape(values.shape)

    def simplify(self, x: Any) -> int | Expr:
        """An integer, as a number if it is one."""
        if isinstance(x, int | np.integer):
            return int(x)
        x = self._analyzer.simplify(x)
        return int(x.value) if isinstance(x, tirx.IntImm) else x

    def compare(self, holds: Binary, opposite: Binary, a: Any, b: Any) -> bool | None:
        """Whether it holds for all dimensions; None if that depends."""
        if isinstance(a, int) and isinstance(b, int):
            return bool(holds(a, b))
        if self._analyzer.can_prove(holds(a, b)):
            return True
        return False if self._analyzer.can_prove(opposite(a, b)) else None

    def quotient(self, whole: Sequence[Any], parts: Sequence[Any]) -> int | Expr:
        """The product of `whole` over that of `parts`, where it is known to be an integer."""
        number, symbols = factors(whole)
        divisor, divisors = factors(parts)
        for symbol in divisors:
            index = next((i for i, s in enumerate(symbols) if s.same_as(symbol)), None)
            if index is None:
                return self.simplify(_product(whole) // _product(parts))
            symbols.pop(index)
        if number % divisor:
            return self.simplify(_product(whole) // _product(parts))
        return self.simplify(_product([number // divisor, *symbols]))


def is_known(value: Any) -> bool:
    """Whether an input of a node is a value rather than a part of the compiled graph."""
    return isinstance(value, np.ndarray)


def _product(values: Sequence[Any]) -> Any:
    return reduce(lambda a, b: a * b, values, 1)


def factors(values: Sequence[Any]) -> tuple[int, list[Expr]]:
    """A product as a number and symbolic factors."""
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


Inputs = Sequence[Any]
Attributes = Mapping[str, Any]
Rule = Callable[[Values, Inputs, Attributes], "np.ndarray | None"]


def _numbers(values: np.ndarray | None) -> list[int] | None:
    """As plain integers, or None if there are others."""
    return None if values is None or values.dtype == object else [int(x) for x in values.reshape(-1)]


def _axes(inputs: Inputs, attrs: Attributes) -> list[int] | None:
    """Axes, which later opsets take as an input."""
    if "axes" in attrs:
        return [int(a) for a in attrs["axes"]]
    return _numbers(inputs[1]) if len(inputs) > 1 else None


def _elementwise(apply: Callable[[Any, Any], Any]) -> Rule:
    def rule(values: Values, inputs: Inputs, attrs: Attributes) -> np.ndarray:
        return reduce(np.frompyfunc(apply, 2, 1), [_plain(x) for x in inputs])

    return rule


def _plain(values: np.ndarray) -> np.ndarray:
    """Elements as Python's integers, which TVM's expressions take."""
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
    return np.array(_product(list(inputs[0].reshape(-1))), object).reshape((1,) * inputs[0].ndim if keep else ())


def _divide(a: Any, b: Any) -> Any:
    """Of sizes: neither is negative."""
    return a // b


_RULES: dict[str, Rule] = {
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


def broadcast(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    """The shape that both broadcast to, by NumPy's rule; a symbolic dimension is taken to be the larger one."""
    rank = max(len(left), len(right))
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in (left, right)]
    return [b if isinstance(a, int) and a == 1 else a for a, b in zip(*padded, strict=True)]
