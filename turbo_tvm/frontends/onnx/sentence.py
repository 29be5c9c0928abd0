"""Put sentence-transformers' pooling and what follows behind an encoder's ONNX graph, as more nodes of it.

The nodes are a small model of their own as well, so that the file's own answers can go through them for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.onnx.file import opset_of
from turbo_tvm.frontends.onnx.inputs import OnnxInputs
from turbo_tvm.frontends.sentence_modules import VECTOR, DenseSpec, LayerNormSpec, SentenceModules
from turbo_tvm.ops.inputs import InputKind

_TOKENS = ("last_hidden_state", "token_embeddings")  # what exporters call the vectors of tokens
_ACTIVATIONS = {"Identity": "Identity", "Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid"}
_PREFIX = "sentence_transformers_"  # of names in the graph


def add_modules(model: onnx.ModelProto, inputs: OnnxInputs, modules: SentenceModules | None) -> SentenceTail | None:
    """Put what a folder's `modules.json` asks for behind a graph that does not have it; return the nodes, if any.

    Raises UnsupportedModelError for a graph without vectors of tokens.
    """
    if modules is None or not modules.pooling or any(output.name == VECTOR for output in model.graph.output):
        return None
    tail = SentenceTail(model, modules, inputs.names[InputKind.ATTENTION_MASK])
    tail.add_to(model)
    return tail


class SentenceTail:
    """The nodes behind an encoder: a call gives vectors, (batch, columns), of an encoder's outputs and its mask."""

    def __init__(self, model: onnx.ModelProto, modules: SentenceModules, mask: str):
        """Build the nodes. Raises UnsupportedModelError for a graph without vectors of tokens.

        mask: the input of the graph that holds the attention mask.
        """
        outputs = [output.name for output in model.graph.output]
        tokens = next((name for name in _TOKENS if name in outputs), outputs[0] if len(outputs) == 1 else None)
        if tokens is None:
            raise UnsupportedModelError(
                f"modules.json asks for pooling, and none of the file's outputs ({', '.join(outputs)}) is called "
                f"{' or '.join(_TOKENS)}"
            )
        self.needs = tokens  # the output of the encoder that is pooled
        self._mask = mask
        self._nodes = _Nodes(opset_of(model))
        self._nodes.behind(tokens, mask, modules)
        self._given = {value.name: value for value in (*model.graph.input, *model.graph.output)}
        self._evaluator = self._alone(model)

    def add_to(self, model: onnx.ModelProto) -> None:
        """Make the vectors the only output of a model."""
        model.graph.node.extend(self._nodes.nodes)
        model.graph.initializer.extend(self._nodes.constants)
        del model.graph.output[:]
        model.graph.output.append(_declared())

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return what the nodes give."""
        fed = {self.needs: outputs[self.needs], self._mask: inputs[self._mask]}
        vectors: Any = self._evaluator.run([VECTOR], fed)
        return vectors[0]

    def _alone(self, model: onnx.ModelProto) -> ReferenceEvaluator:
        given = [self._given[name] for name in (self.needs, self._mask)]
        graph = helper.make_graph(self._nodes.nodes, "pooling", given, [_declared()], self._nodes.constants)
        return ReferenceEvaluator(helper.make_model(graph, opset_imports=list(model.opset_import)))


def _declared() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(VECTOR, onnx.TensorProto.FLOAT, ["batch", "columns"])


class _Nodes:
    """Nodes of an opset, as they are written down one after the other."""

    def __init__(self, opset: int):
        self._opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._pool: dict[str, Callable[[str, str], str]] = {
            "cls": lambda tokens, _mask: self.emit("Gather", tokens, self.constant(np.int64(0)), axis=1),
            "max": self._max,
            "mean": lambda tokens, mask: self._mean(tokens, mask),
            "mean_sqrt_len_tokens": lambda tokens, mask: self._mean(tokens, mask, of_square_root=True),
            "weightedmean": lambda tokens, mask: self._mean(tokens, self._counted(mask)),
            "lasttoken": self._last,
        }

    def emit(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Write a node down; return the name of its output."""
        name = output or f"{_PREFIX}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"{_PREFIX}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def behind(self, tokens: str, mask: str, modules: SentenceModules) -> None:
        """Write down all that the modules ask for.

        tokens: (batch, length, columns). mask: (batch, length), of any type.
        """
        columns = self._with_axis(self.emit("Cast", mask, to=onnx.TensorProto.FLOAT), 2)
        parts = [self._pool[mode](tokens, columns) for mode in modules.pooling]
        vectors = parts[0] if len(parts) == 1 else self.emit("Concat", *parts, axis=1)
        for spec in modules.then:
            vectors = self._dense(vectors, spec) if isinstance(spec, DenseSpec) else self._layer_norm(vectors, spec)
        if modules.normalize:
            length = self._reduce("ReduceL2", vectors, 1, keep=True, with_input=18)
            length = self.emit("Clip", length, self.constant(np.float32(1e-12)))
            vectors = self.emit("Div", vectors, length)
        self.emit("Identity", vectors, output=VECTOR)

    def _mean(self, tokens: str, weights: str, of_square_root: bool = False) -> str:
        total = self._sum(self.emit("Mul", tokens, weights), 1)
        divisor = self.emit("Max", self._sum(weights, 1), self.constant(np.float32(1e-9)))
        return self.emit("Div", total, self.emit("Sqrt", divisor) if of_square_root else divisor)

    def _max(self, tokens: str, mask: str) -> str:
        lowest = self.constant(np.float32(-np.inf))
        masked = self.emit("Where", self.emit("Cast", mask, to=onnx.TensorProto.BOOL), tokens, lowest)
        return self._reduce("ReduceMax", masked, 1, keep=False, with_input=18)

    def _last(self, tokens: str, mask: str) -> str:
        is_last = self.emit("Equal", self._counted(mask), self._sum(mask, 1, keep=True))
        return self._sum(self.emit("Mul", tokens, self.emit("Cast", is_last, to=onnx.TensorProto.FLOAT)), 1)

    def _counted(self, mask: str) -> str:
        """n for the n-th real token, 0 for padding."""
        return self.emit("Mul", self.emit("CumSum", mask, self.constant(np.int64(1))), mask)

    def _dense(self, vectors: str, spec: DenseSpec) -> str:
        if spec.activation not in _ACTIVATIONS:
            raise UnsupportedModelError(f"the activation {spec.activation} of a Dense module is not supported in ONNX")
        bias = [] if spec.bias is None else [self.constant(spec.bias)]
        made = self.emit("Gemm", vectors, self.constant(spec.weight), *bias, transB=1)
        made = self.emit(_ACTIVATIONS[spec.activation], made)
        if spec.residual is None:
            return made
        kept = spec.residual
        other = vectors if isinstance(kept, str) else self.emit("Gemm", vectors, self.constant(kept), transB=1)
        return self.emit("Add", made, other)

    def _layer_norm(self, vectors: str, spec: LayerNormSpec) -> str:
        columns = self.constant(np.float32(len(spec.weight)))
        centred = self.emit("Sub", vectors, self.emit("Div", self._sum(vectors, 1, keep=True), columns))
        variance = self.emit("Div", self._sum(self.emit("Mul", centred, centred), 1, keep=True), columns)
        deviation = self.emit("Sqrt", self.emit("Add", variance, self.constant(np.float32(spec.eps))))
        scaled = self.emit("Mul", self.emit("Div", centred, deviation), self.constant(spec.weight))
        return self.emit("Add", scaled, self.constant(spec.bias))

    def _sum(self, values: str, axis: int, keep: bool = False) -> str:
        return self._reduce("ReduceSum", values, axis, keep, with_input=13)

    def _reduce(self, operator: str, values: str, axis: int, keep: bool, with_input: int) -> str:
        """with_input: the opset from which on axes are an input."""
        if self._opset >= with_input:
            return self.emit(operator, values, self.constant(np.array([axis])), keepdims=int(keep))
        return self.emit(operator, values, axes=[axis], keepdims=int(keep))

    def _with_axis(self, values: str, axis: int) -> str:
        if self._opset >= 13:
            return self.emit("Unsqueeze", values, self.constant(np.array([axis])))
        return self.emit("Unsqueeze", values, axes=[axis])
