"""Repeating a tensor, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from turbo_tvm.frontends.tile import tile


@pytest.mark.parametrize(
    ("shape", "counts"), [((3,), (2,)), ((2, 3), (2, 1)), ((2, 3), (1, 2)), ((3,), (2, 2)), ((1, 2), ("n", 3))], ids=str
)
def test_as_numpy_does(shape, counts):
    """A count may be the extent of another input."""
    n = tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    other = relax.Var("other", relax.TensorType((n,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, other]):
        with builder.dataflow():
            out = builder.emit_output(tile(builder.emit, x, [n if c == "n" else c for c in counts]))
        builder.emit_func_output(out)
    machine = relax.VirtualMachine(tvm.compile(builder.finalize(), target="llvm"), tvm.cpu())
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    got = machine["main"](tvm.runtime.tensor(values), tvm.runtime.tensor(np.zeros(5, np.float32))).numpy()
    np.testing.assert_array_equal(got, np.tile(values, [5 if c == "n" else c for c in counts]))
