"""From an ONNX graph to Relax, with symbolic batch and length, on TVM's converters of ONNX operators.

TVM's own loop over the graph keeps shapes as tensors where exporters compute with them, and then cannot say what rank
or shape a reshape has. This loop evaluates such values (`onnx_values.py`), converts what takes a shape as an operand
itself, and leaves every other operator to TVM.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from tvm import ir, relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend as stock

from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.onnx import fused as onnx_fused
from turbo_tvm.frontends.onnx import operators as onnx_operators
from turbo_tvm.frontends.onnx.fixed import Loosen
from turbo_tvm.frontends.onnx.values import Values, is_known
from turbo_tvm.passes.rewriter import shape_of

_OWN = onnx_operators.OPERATORS | onnx_fused.OPERATORS
_WEIGHT_ELEMENTS = 2  # smaller floating-point constants are part of the code, not weights


class OnnxGraph:
    """Imports the graph of a checked model.

    inputs: `main`'s parameters by the graph's names for them, int64 (batch, length) or images; they are cast to what
    the graph declares. dims: the symbolic dimensions. fixed: the numbers that the graph has in their place, None where
    it has none (`onnx_fixed.py`).
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        inputs: Mapping[str, relax.Var],
        dims: Sequence[tirx.Var],
        fixed: Sequence[int | None] = (),
    ):
        self.graph = model.graph
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.inputs = inputs
        self.values = Values(dims, self.opset)
        self.loosen = Loosen(dims, fixed)
        self.builder = relax.BlockBuilder()
        self.known: dict[str, np.ndarray] = {}
        self.nodes: dict[str, relax.Expr] = {}
        self.weights: dict[str, tuple[relax.Var, np.ndarray]] = {}  # by the variable's name
        self.sliced: list[int] = []  # what constants that are cut to the length allow
        self._parser = stock.ONNXGraphImporter({}, "float32")
        self._converters = stock._get_convert_map()

    def run(self) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
        """`main(inputs..., weights...)` and the weights' values.

        UnsupportedModelError names an operator, and its node, that cannot be imported.
        """
        self._constants(self.graph)
        weights = [var for var, _ in self.weights.values()]
        params = [*dict.fromkeys(self.inputs.values()), *weights]
        count = len(params) - len(weights)
        with self.builder.function("main", params, attrs={"num_input": count}):
            with self.builder.dataflow():
                self._declare_inputs()
                try:
                    self._convert_all(self.graph)
                    results = [self.expression(self._value(output.name)) for output in self.graph.output]
                    failed = None
                except UnsupportedModelError as error:  # TVM complains of a builder that is left half-way
                    results, failed = [params[0]], error
                out = self.builder.emit_output(results[0] if len(results) == 1 else relax.Tuple(results))
            self.builder.emit_func_output(out)
        if failed is not None:
            raise failed
        mod = relax.transform.DeadCodeElimination(["main"])(self.builder.finalize())
        return self._without_unused(mod, count)

    def _without_unused(self, mod: ir.IRModule, count: int) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
        """The function without the weights that only values which are known now were made from."""
        main = mod["main"]
        used = set(relax.analysis.free_vars(main.body))
        kept = [p for p in main.params[count:] if p in used]
        params = [*main.params[:count], *kept]
        func = relax.Function(params, main.body, main.ret_ty, is_pure=True, attrs=main.attrs)
        weights = [tvm.runtime.tensor(np.ascontiguousarray(self.weights[p.name][1])) for p in kept]
        mod.update_func(mod.get_global_var("main"), func)
        return mod, weights

    # Constants, weights and inputs

    def _constants(self, graph: onnx.GraphProto) -> None:
        """Initializers and `Constant` nodes: weights as parameters, integers and single numbers as known values."""
        for tensor in graph.initializer:
            self._constant(tensor.name, numpy_helper.to_array(tensor))
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self._constant(node.output[0], _constant_value(node))
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self._constants(attribute.g)

    def _constant(self, name: str, array: np.ndarray) -> None:
        floating = array.dtype.kind == "f" or "float" in str(array.dtype)
        if not floating or array.size < _WEIGHT_ELEMENTS:
            self.known[name] = array
            return
        if array.dtype != np.float32:
            array = array.astype(np.float32)
        clean = "".join(
            c if c.isalnum() or c == "_" else "_" for c in name.removeprefix("onnx::").removeprefix("model.")
        )
        clean = clean if clean[:1].isalpha() or clean.startswith("_") else f"w_{clean}"
        while clean in self.weights or any(clean == p.name for p in self.inputs.values()):
            clean += "_"
        var = relax.Var(clean, relax.TensorType(array.shape, "float32"))
        self.weights[clean] = (var, array)
        self.nodes[name] = var

    def _declare_inputs(self) -> None:
        for declared in self.graph.input:
            if declared.name in self.nodes or declared.name in self.known:  # older files list initializers as inputs
                continue
            dtype = str(helper.tensor_dtype_to_np_dtype(declared.type.tensor_type.elem_type))
            var = self.inputs[declared.name]
            self.nodes[declared.name] = var if dtype == str(var.ty.dtype) else self.emit(relax.op.astype(var, dtype))

    # Nodes

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind an expression; tuples and variables as they are."""
        expr = self.builder.normalize(expr)
        return expr if isinstance(expr, relax.Var | relax.Tuple | ir.GenericConst) else self.builder.emit(expr)

    def expression(self, value: Any) -> relax.Expr:
        """A value, or a part of the graph, as an expression."""
        if not is_known(value):
            return value
        if value.dtype != object:
            constant = relax.const(value, str(value.dtype))
            axes, stops = self.loosen.cut(value.shape)
            if not axes:
                return constant
            self.sliced += [value.shape[axis] for axis in axes]
            starts = [0] * len(axes)
            return self.emit(relax.op.strided_slice(constant, axes, starts, stops, assume_inbound=True))
        flat = self.emit(relax.op.shape_to_tensor(relax.ShapeExpr([_int64(x) for x in value.reshape(-1)])))
        return flat if value.ndim == 1 else self.emit(relax.op.reshape(flat, value.shape))

    def is_weight(self, expr: relax.Expr) -> bool:
        """Whether it is one of the file's weights, as it is stored."""
        return isinstance(expr, relax.Var) and expr.name in self.weights

    def _value(self, name: str) -> Any:
        """What a name stands for: None, a known value or an expression."""
        return None if name == "" else self.known[name] if name in self.known else self.nodes[name]

    def _convert_all(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                continue
            inputs = [self._value(name) for name in node.input]
            self._keep(node, self._convert(node, inputs))

    def _keep(self, node: onnx.NodeProto, results: Sequence[Any]) -> None:
        for name, result in zip(node.output, results, strict=False):  # unused results may be left out
            if is_known(result):
                self.known[name] = result
            else:
                self.nodes[name] = result

    def _convert(self, node: onnx.NodeProto, inputs: list[Any]) -> Sequence[Any]:
        attrs = self._parser._parse_attr(node.attribute)
        try:
            if node.op_type == "If" and is_known(inputs[0]):
                return self._branch(attrs["then_branch" if inputs[0].item() else "else_branch"])
            if node.op_type == "Shape":
                dims = list(inputs[0].shape) if is_known(inputs[0]) else shape_of(inputs[0])
                return [self.values.tidy(np.array(_part(dims, attrs), object))]
            if all(x is None or is_known(x) for x in inputs):
                found = self.values.evaluate(node, inputs, attrs)
                if found is not None:
                    return found
            rule = _OWN.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
            if rule is not None:
                made = rule(self, inputs, attrs)
                if made is not None:
                    return [self.emit(x) if isinstance(x, relax.Expr) else x for x in made]
            return self._stock(node, inputs, attrs)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever TVM's converters raise
            raise refused(node, summary(error)) from error

    def _branch(self, graph: onnx.GraphProto) -> list[Any]:
        """The results of a branch that is known to be taken."""
        self._convert_all(graph)
        return [self._value(output.name) for output in graph.output]

    def _stock(self, node: onnx.NodeProto, inputs: list[Any], attrs: dict[str, Any]) -> Sequence[Any]:
        """TVM's conversion."""
        converter = self._converters.get(node.op_type)
        if converter is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
            raise refused(node, "there is no conversion of this operator")
        attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        operands = stock.onnx_input([None if x is None else self.expression(x) for x in inputs])
        if node.op_type in ("Add", "Sub", "Mul", "Div"):
            operands = stock.onnx_input(self._cut_weights(operands))
        params = [self.nodes, {name: (var, tvm.runtime.tensor(a)) for name, (var, a) in self._small(operands)}]
        with contextlib.redirect_stdout(io.StringIO()):
            made = self.emit(converter.get_converter(self.opset)(self.builder, operands, attrs, params))
        if isinstance(made.ty, relax.TupleType) and not isinstance(made, relax.Tuple):
            return [self.emit(relax.TupleGetItem(made, i)) for i in range(len(made.ty.fields))]
        if isinstance(made, relax.Tuple):
            return [self.emit(field) for field in made.fields]
        if not shape_of(made) and made.ty.ndim != 0:
            raise refused(node, "the shape of its result is not known before it runs")
        return [made]

    def _cut_weights(self, operands: Sequence[relax.Expr]) -> list[relax.Expr]:
        """Weights that hold a row per token of a fixed length, cut to the length of what they are combined with."""
        return [self._cut_weight(x, other) for x, other in zip(operands, reversed(operands), strict=True)]

    def _cut_weight(self, x: relax.Expr, other: relax.Expr) -> relax.Expr:
        dims, others = shape_of(x), shape_of(other)
        axes = [
            axis
            for axis in self.loosen.cut(dims)[0]
            if self.is_weight(x) and len(dims) - axis <= len(others) and not isinstance(others[axis - len(dims)], int)
        ]
        if not axes:
            return x
        self.sliced += [dims[axis] for axis in axes]
        stops = [others[axis - len(dims)] for axis in axes]
        return self.emit(relax.op.strided_slice(x, axes, [0] * len(axes), stops, assume_inbound=True))

    def _small(self, operands: Sequence[Any]) -> list[tuple[str, tuple[relax.Var, np.ndarray]]]:
        """The weights among a node's operands: a converter may ask for their values."""
        names = [x.name for x in operands if isinstance(x, relax.Var) and x.name in self.weights]
        return [(name, self.weights[name]) for name in names if self.weights[name][1].size <= 4096]


def refused(node: onnx.NodeProto, why: str) -> UnsupportedModelError:
    """The error for a node that cannot be imported."""
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    name = f"node {node.name!r}" if node.name else f"the node that makes {node.output[0]!r}"
    return UnsupportedModelError(
        f"the ONNX operator {domain}{node.op_type} ({name}) cannot be imported: {why}; export the model again with "
        "torch.onnx.export(..., dynamo=True) or another opset (11 to 23), or compile the PyTorch model itself"
    )


def _constant_value(node: onnx.NodeProto) -> np.ndarray:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    if attribute.name in ("value_float", "value_floats"):
        return np.array(value, np.float32)
    if attribute.name in ("value_int", "value_ints"):
        return np.array(value, np.int64)
    raise refused(node, f"its value is a {attribute.name}")


def _part(dims: list[Any], attrs: Mapping[str, Any]) -> list[Any]:
    """The dimensions that a `Shape` asks for."""
    return dims[attrs.get("start", 0) : attrs.get("end", len(dims))]


def _int64(x: Any) -> Any:
    return tirx.const(int(x), "int64") if isinstance(x, int) else x
