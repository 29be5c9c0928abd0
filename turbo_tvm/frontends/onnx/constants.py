"""Tell an ONNX graph's constants apart: weights become parameters, integers and single numbers known values."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tvm import relax

from turbo_tvm.errors import UnsupportedModelError

_WEIGHT_ELEMENTS = 2  # smaller floating-point constants are part of the code, not weights


class Constants:
    """The constants of a graph and of the graphs inside its nodes."""

    def __init__(self, taken: set[str]):
        """taken: names that no weight may have."""
        self.weights: dict[str, tuple[relax.Var, np.ndarray]] = {}  # variable and fp32 value, by the variable's name
        self.variables: dict[str, relax.Var] = {}  # of weights, by the graph's name
        self.known: dict[str, np.ndarray] = {}  # values of all other constants, by the graph's name
        self._taken = taken

    def add_all(self, graph: onnx.GraphProto) -> None:
        """Add the initializers and `Constant` nodes of a graph."""
        for tensor in graph.initializer:
            self._add(tensor.name, numpy_helper.to_array(tensor))
        for node in graph.node:
            if is_constant(node):
                self._add(node.output[0], _constant_value(node))
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self.add_all(attribute.g)

    def _add(self, name: str, array: np.ndarray) -> None:
        floating = array.dtype.kind == "f" or "float" in str(array.dtype)
        if not floating or array.size < _WEIGHT_ELEMENTS:
            self.known[name] = array
            return
        if array.dtype != np.float32:
            array = array.astype(np.float32)
        clean = self._identifier(name)
        var = relax.Var(clean, relax.TensorType(array.shape, "float32"))
        self.weights[clean] = (var, array)
        self.variables[name] = var

    def _identifier(self, name: str) -> str:
        """Return a name that is still free, of letters, digits and underscores."""
        plain = name.removeprefix("onnx::").removeprefix("model.")
        clean = "".join(c if c.isalnum() or c == "_" else "_" for c in plain)
        clean = clean if clean[:1].isalpha() or clean.startswith("_") else f"w_{clean}"
        while clean in self.weights or clean in self._taken:
            clean += "_"
        return clean


def is_constant(node: onnx.NodeProto) -> bool:
    """Return whether a node is ONNX's `Constant`."""
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def refused(node: onnx.NodeProto, why: str) -> UnsupportedModelError:
    """Return the error for a node that cannot be imported."""
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    name = f"node {node.name!r}" if node.name else f"the node that makes {node.output[0]!r}"
    return UnsupportedModelError(
        f"the ONNX operator {domain}{node.op_type} ({name}) cannot be imported: {why}; export the model again with "
        "torch.onnx.export(..., dynamo=True) or another opset (11 to 23), or compile the PyTorch model itself"
    )


def _constant_value(node: onnx.NodeProto) -> np.ndarray:
    """Return the value of a `Constant` node. Raises UnsupportedModelError for other values, such as strings."""
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    if attribute.name in ("value_float", "value_floats"):
        return np.array(value, np.float32)
    if attribute.name in ("value_int", "value_ints"):
        return np.array(value, np.int64)
    raise refused(node, f"its value is a {attribute.name}")
