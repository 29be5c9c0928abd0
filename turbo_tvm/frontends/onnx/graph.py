"""Bring an ONNX graph to Relax, with symbolic batch and length, on TVM's converters of ONNX operators.

TVM's own loop over the graph keeps shapes as tensors where exporters compute with them, and then cannot say what rank
or shape a reshape has. This loop evaluates such values (`values.py`), converts what takes a shape as an operand
itself (`operators.py`) and fused operators (`fused.py`), and leaves every other operator to TVM.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper
from tvm import ir, relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend as stock

from turbo_tvm import tvm_compat
from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.onnx import fused, operators
from turbo_tvm.frontends.onnx.constants import Constants, is_constant, refused
from turbo_tvm.frontends.onnx.file import opset_of
from turbo_tvm.frontends.onnx.fixed import Loosen
from turbo_tvm.frontends.onnx.values import Values, is_known
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.ops.inputs import NUM_INPUT
from turbo_tvm.passes.rewriter import shape_of

_OWN = operators.OPERATORS | fused.OPERATORS  # converters that come before TVM's
_ASKED_FOR = 4096  # elements: a converter of TVM may ask for the values of weights that are no larger


class OnnxGraph:
    """Imports the graph of a checked model, once."""

    def __init__(
        self,
        model: onnx.ModelProto,
        inputs: Mapping[str, relax.Var],
        dims: Sequence[tirx.Var],
        fixed: Sequence[int | None] = (),
    ):
        """Prepare an import.

        inputs: `main`'s parameters by the graph's names for them, int64 (batch, length) or images; they are cast to
            what the graph declares.
        dims: the symbolic batch and length.
        fixed: the numbers that the graph has in their place, None where it has none (`fixed.py`).
        """
        self.graph = model.graph
        self.opset = opset_of(model)
        self.inputs = inputs
        self.values = Values(dims, self.opset)
        self.loosen = Loosen(dims, fixed)
        self.builder = relax.BlockBuilder()
        constants = Constants({p.name for p in inputs.values()})
        constants.add_all(model.graph)
        self.weights = constants.weights  # variable and value, by the variable's name
        self.known: dict[str, np.ndarray] = constants.known  # values, by the graph's name
        self.nodes: dict[str, relax.Expr] = dict(constants.variables)  # other results, by the graph's name
        self.sliced: list[int] = []  # how many tokens constants that are cut to the length allow
        self._parser = stock.ONNXGraphImporter({}, "float32")
        self._converters = tvm_compat.onnx_converters(stock)

    def run(self) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
        """Return `main(inputs..., weights...)` and the weights' values.

        Raises UnsupportedModelError, which names the operator and the node that cannot be imported.
        """
        weights = [var for var, _ in self.weights.values()]
        params = [*dict.fromkeys(self.inputs.values()), *weights]
        count = len(params) - len(weights)
        with self.builder.function(ENCODE, params, attrs={NUM_INPUT: count}):
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
        mod = relax.transform.DeadCodeElimination([ENCODE])(self.builder.finalize())
        return self._without_unused(mod, count)

    def _without_unused(self, mod: ir.IRModule, count: int) -> tuple[ir.IRModule, list[tvm.runtime.Tensor]]:
        """Drop the weights that only values which are known now were made from."""
        main = mod[ENCODE]
        used = set(relax.analysis.free_vars(main.body))
        kept = [p for p in main.params[count:] if p in used]
        params = [*main.params[:count], *kept]
        func = relax.Function(params, main.body, main.ret_ty, is_pure=True, attrs=main.attrs)
        weights = [tvm.runtime.tensor(np.ascontiguousarray(self.weights[p.name][1])) for p in kept]
        mod.update_func(mod.get_global_var(ENCODE), func)
        return mod, weights

    def _declare_inputs(self) -> None:
        for declared in self.graph.input:
            if declared.name in self.nodes or declared.name in self.known:  # older files list initializers as inputs
                continue
            dtype = str(helper.tensor_dtype_to_np_dtype(declared.type.tensor_type.elem_type))
            var = self.inputs[declared.name]
            self.nodes[declared.name] = var if dtype == str(var.ty.dtype) else self.emit(relax.op.astype(var, dtype))

    # Nodes

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind an expression in `main`; tuples, variables and constants stay as they are."""
        expr = self.builder.normalize(expr)
        return expr if isinstance(expr, relax.Var | relax.Tuple | ir.GenericConst) else self.builder.emit(expr)

    def expression(self, value: Any) -> relax.Expr:
        """Return a value, or a part of the graph, as an expression."""
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
        """Return whether it is one of the file's weights, as it is stored."""
        return isinstance(expr, relax.Var) and expr.name in self.weights

    def _value(self, name: str) -> Any:
        """Return what a name stands for: None for none, a known value or an expression."""
        return None if name == "" else self.known[name] if name in self.known else self.nodes[name]

    def _convert_all(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if is_constant(node):
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
        """Return the results of a branch that is known to be taken."""
        self._convert_all(graph)
        return [self._value(output.name) for output in graph.output]

    def _stock(self, node: onnx.NodeProto, inputs: list[Any], attrs: dict[str, Any]) -> Sequence[Any]:
        """Convert a node by TVM's converter. Raises UnsupportedModelError where there is none that serves."""
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
        """Cut weights that hold a row per token of a fixed length to the length of what they are combined with."""
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
        """Return the weights among a node's operands whose values a converter may ask for."""
        names = [x.name for x in operands if isinstance(x, relax.Var) and x.name in self.weights]
        return [(name, self.weights[name]) for name in names if self.weights[name][1].size <= _ASKED_FOR]


def _part(dims: list[Any], attrs: Mapping[str, Any]) -> list[Any]:
    """Return the dimensions that a `Shape` asks for."""
    return dims[attrs.get("start", 0) : attrs.get("end", len(dims))]


def _int64(x: Any) -> Any:
    return tirx.const(int(x), "int64") if isinstance(x, int) else x
