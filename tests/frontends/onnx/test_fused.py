"""Fused operators, one at a time: what the importer makes of a node answers as ONNX Runtime does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax, tirx

from turbo_tvm.frontends.onnx.graph import OnnxGraph
from turbo_tvm.ops.entry import ENCODE

BATCH, LENGTH, HEADS, WIDTH = 2, 5, 2, 8
RNG = np.random.default_rng(0)


def some(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


X, GAMMA, BETA = some(BATCH, LENGTH, WIDTH), some(WIDTH), some(WIDTH)
HEADS_FIRST = [some(BATCH, HEADS, LENGTH, 4) for _ in range(3)]
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
PAIRS = np.repeat(MASK.astype(bool)[:, None, None, :], LENGTH, axis=2)  # which keys a query sees
CASES: dict[str, tuple[str, str, list[np.ndarray], dict[str, Any]]] = {
    "skip layer norm": (
        "com.microsoft",
        "SkipLayerNormalization",
        [X, some(*X.shape), GAMMA, BETA, BETA],
        {"epsilon": 1e-6},
    ),
    "skip rms norm": (
        "com.microsoft",
        "SkipSimplifiedLayerNormalization",
        [X, some(*X.shape), GAMMA],
        {"epsilon": 1e-6},
    ),
    "bias gelu": ("com.microsoft", "BiasGelu", [X, BETA], {}),
    "gelu": ("com.microsoft", "Gelu", [X], {}),
    "fast gelu": ("com.microsoft", "FastGelu", [X, BETA], {}),
    "quick gelu": ("com.microsoft", "QuickGelu", [X], {"alpha": 1.702}),
    "matmul": ("com.microsoft", "FusedMatMul", [X, some(7, WIDTH)], {"transB": 1, "alpha": 0.5}),
    "gemm": (
        "com.microsoft",
        "FusedGemm",
        [some(3, WIDTH), some(7, WIDTH), some(7)],
        {"transB": 1, "activation": "Tanh"},
    ),
    "attention": (
        "com.microsoft",
        "Attention",
        [X, some(WIDTH, 3 * WIDTH), some(3 * WIDTH), MASK],
        {"num_heads": HEADS},
    ),
    "attention by length": (
        "com.microsoft",
        "Attention",
        [X, some(WIDTH, 3 * WIDTH), some(3 * WIDTH), MASK.sum(1).astype(np.int32)],
        {"num_heads": HEADS},
    ),
    "causal attention": (
        "com.microsoft",
        "Attention",
        [X, some(WIDTH, 3 * WIDTH), some(3 * WIDTH)],
        {"num_heads": HEADS, "unidirectional": 1, "scale": 0.3},
    ),
    "multi-head attention": (
        "com.microsoft",
        "MultiHeadAttention",
        [X, some(*X.shape), some(*X.shape), some(3 * WIDTH), MASK],
        {"num_heads": HEADS},
    ),
    "opset 23 attention": ("", "Attention", HEADS_FIRST, {"scale": 0.3}),
    "opset 23 causal attention": ("", "Attention", HEADS_FIRST, {"is_causal": 1}),
    "opset 23 grouped attention": (
        "",
        "Attention",
        [some(BATCH, LENGTH, 16), some(BATCH, LENGTH, 8), some(BATCH, LENGTH, 8)],
        {"q_num_heads": 4, "kv_num_heads": 2},
    ),
    "opset 23 masked attention": ("", "Attention", [*HEADS_FIRST, PAIRS], {}),
    "opset 23 rms norm": ("", "RMSNormalization", [X, GAMMA], {"epsilon": 1e-6}),
    "opset 23 rotary": ("", "RotaryEmbedding", [HEADS_FIRST[0], some(BATCH, LENGTH, 2), some(BATCH, LENGTH, 2)], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_node_answers_as_the_runtime_does(case):
    domain, operator, inputs, attributes = CASES[case]
    names = [f"x{i}" for i in range(len(inputs))]
    node = helper.make_node(operator, names, ["out"], domain=domain, **attributes)
    types = [helper.np_dtype_to_tensor_dtype(x.dtype) for x in inputs]
    # The first is an input, the others are constants, as weights are, or small integers.
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x0", types[0], inputs[0].shape)],
        [helper.make_empty_tensor_value_info("out")],
        [numpy_helper.from_array(x, name) for name, x in zip(names[1:], inputs[1:], strict=True)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x0": inputs[0]})
    var = relax.Var("x0", relax.TensorType(inputs[0].shape, "float32"))
    mod, weights = OnnxGraph(model, {"x0": var}, (tirx.Var("b", "int64"), tirx.Var("s", "int64"))).run()
    machine = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    got = machine[ENCODE](tvm.runtime.tensor(inputs[0]), *weights).numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-5)
