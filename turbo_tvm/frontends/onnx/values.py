"""Evaluate what an ONNX graph computes from shapes and constants alone, while it is imported.

Exporters spell a reshape as a dozen nodes that take shapes apart and put them together again. Their values are known
when the graph is read: numbers, or integers in the symbolic batch and length. A value is a NumPy array; of dtype object
if it holds symbolic integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import ir, tirx
from tvm.ir import Expr
from tvm.sym.analyzer import Analyzer

from turbo_tvm.frontends.onnx.extents import factors, product
from turbo_tvm.frontends.onnx.value_rules import RULES

MAX_ELEMENTS = 1 << 20  # larger results are left to the compiled code

Binary = Callable[[Any, Any], Any]

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


class Values:
    """Evaluates nodes of a graph."""

    def __init__(self, dims: Iterable[tirx.Var], opset: int):
        """dims: the symbolic dimensions, each at least 1. opset: of the graph."""
        self.opset = opset
        self._analyzer = Analyzer()
        for dim in dims:
            self._analyzer.bind(dim, ir.Range(1, 1 << 30))

    def evaluate(
        self, node: onnx.NodeProto, inputs: Sequence[np.ndarray | None], attrs: Mapping[str, Any]
    ) -> list[np.ndarray] | None:
        """Return the node's results, or None if they cannot be known (yet).

        inputs: their values, None for those that are left out.
        attrs: the node's attributes, by name.
        """
        if node.op_type in _RANDOM or node.domain not in ("", "ai.onnx"):
            return None
        if any(x is not None and x.dtype == object for x in inputs):
            rule = RULES.get(node.op_type)
            found = rule(self, inputs, attrs) if rule is not None else None
            return None if found is None else [self.tidy(found)]
        return self._run(node, inputs)

    def _run(self, node: onnx.NodeProto, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
        """Evaluate a node on numbers, by ONNX's own reference; None if that cannot, or if the results are too large."""
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
        """Return the values simplified; int64 if no element is symbolic."""
        values = np.asarray(values, object)
        flat = [self.simplify(x) for x in values.reshape(-1)]
        if all(isinstance(x, int) for x in flat):
            return np.array(flat, np.int64).reshape(values.shape)
        done = np.empty(len(flat), object)
        done[:] = flat
        return done.reshape(values.shape)

    def simplify(self, x: Any) -> int | Expr:
        """Return an integer simplified, as a number if it is one."""
        if isinstance(x, int | np.integer):
            return int(x)
        x = self._analyzer.simplify(x)
        return int(x.value) if isinstance(x, tirx.IntImm) else x

    def compare(self, holds: Binary, opposite: Binary, a: Any, b: Any) -> bool | None:
        """Return whether a relation of a and b holds for all dimensions; None if that depends on them.

        opposite: the relation that holds where the first does not.
        """
        if isinstance(a, int) and isinstance(b, int):
            return bool(holds(a, b))
        if self._analyzer.can_prove(holds(a, b)):
            return True
        return False if self._analyzer.can_prove(opposite(a, b)) else None

    def quotient(self, whole: Sequence[Any], parts: Sequence[Any]) -> int | Expr:
        """Return the product of `whole` over that of `parts`, where it is known to be an integer."""
        number, symbols = factors(whole)
        divisor, divisors = factors(parts)
        for symbol in divisors:
            index = next((i for i, s in enumerate(symbols) if s.same_as(symbol)), None)
            if index is None:
                return self.simplify(product(whole) // product(parts))
            symbols.pop(index)
        if number % divisor:
            return self.simplify(product(whole) // product(parts))
        return self.simplify(product([number // divisor, *symbols]))


def is_known(value: Any) -> bool:
    """Return whether an input of a node is a value rather than a part of the compiled graph."""
    return isinstance(value, np.ndarray)
