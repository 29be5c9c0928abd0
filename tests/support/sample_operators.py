"""Every operator of the vocabulary, with as little as it can have and with all that it can have."""

from __future__ import annotations

import dataclasses

from tvm import ir, relax, tirx

from turbo_tvm.ops import (
    Attention,
    CastRows,
    CastWeight,
    Embedding,
    Gate,
    L2Normalize,
    Linear,
    Norm,
    Operator,
    PackBias,
    PackDistances,
    PackWeight,
    Pool,
    Rotary,
    Softmax,
    TileRows,
    UntileRows,
)
from turbo_tvm.ops.call import to_call
from turbo_tvm.ops.operand import Operand
from turbo_tvm.ops.pool import LARGEST

ROWS = Operand.rows(8, row_tile=4)
HALF_ROWS = Operand.rows(8, "uint16", row_tile=4)
WIDE_ROWS = Operand.rows(16, row_tile=4)
FLAT_ROWS = Operand((None, 8), "float32")
VECTOR = Operand((8,), "float32")
IDS = Operand((None, 4), "int32")
PLACES = Operand((None,), "int32")
MASK = Operand((None, 4), "int64")
QUERY_TILES = Operand((None, 3), "int32")
SQUARE = Operand((8, 8), "float32")

_HEADS = {"heads": 2, "head_dim": 4, "scale": 0.5, "max_length": 16, "first_columns": (0, 0, 0)}

SAMPLES: tuple[Operator, ...] = (
    Embedding(ids=(IDS,), tables=(Operand((50, 8), "float32"),), out=ROWS),
    Embedding(
        ids=(IDS, IDS),
        tables=(Operand((50, 8), "uint16"), Operand((2, 8), "uint16")),
        gamma=VECTOR,
        beta=VECTOR,
        norm_eps=1e-12,
        out=HALF_ROWS,
    ),
    Linear(x=ROWS, weight=SQUARE, bias=VECTOR, out=ROWS),
    Linear(
        x=HALF_ROWS,
        weight=Operand((1, 4, 8), "int32"),
        bias=VECTOR,
        residual=ROWS,
        gamma=VECTOR,
        beta=VECTOR,
        activation="gelu",
        norm_eps=1e-5,
        columns=8,
        out=WIDE_ROWS,
    ),
    Gate(x=WIDE_ROWS, activation="silu", columns=8, out=ROWS),
    Gate(x=WIDE_ROWS, activation="gelu", columns=8, second=True, out=HALF_ROWS),
    Rotary(
        x=WIDE_ROWS,
        position_ids=IDS,
        table=Operand((16, 4), "float32"),
        columns=16,
        head_dim=4,
        spans=((0, 2), (12, 1)),
        out=WIDE_ROWS,
    ),
    Attention(q=ROWS, k=ROWS, v=ROWS, mask=MASK, out=ROWS, **_HEADS),
    Attention(
        q=HALF_ROWS,
        k=WIDE_ROWS,
        v=WIDE_ROWS,
        query_tiles=QUERY_TILES,
        position_bias=Operand((2, 31), "float32"),
        kv_heads=1,
        window=5,
        out=ROWS,
        **_HEADS | {"first_columns": (0, 4, 8)},
    ),
    Attention(
        q=ROWS,
        k=ROWS,
        v=ROWS,
        query_tiles=QUERY_TILES,
        key_table=Operand((8 * 32,), "float32"),
        query_table=Operand((8 * 32,), "float32"),
        out=ROWS,
        **_HEADS,
    ),
    Norm(x=ROWS, gamma=VECTOR, eps=1e-6, out=ROWS),
    Norm(x=ROWS, residual=HALF_ROWS, gamma=VECTOR, beta=VECTOR, eps=1e-12, out=ROWS),
    L2Normalize(x=ROWS, eps=1e-12, out=ROWS),
    Softmax(x=ROWS, out=ROWS),
    Pool(x=ROWS, mask=MASK, mode="mean", out=ROWS),
    Pool(x=ROWS, cu_seqlens=PLACES, mode="first", row=2, out=ROWS),
    Pool(x=ROWS, pooled_rows=PLACES, mode="first", token=LARGEST, out=ROWS),
    CastRows(x=ROWS, out=HALF_ROWS),
    TileRows(x=FLAT_ROWS, out=ROWS),
    UntileRows(x=ROWS, out=FLAT_ROWS),
    PackWeight(weight=SQUARE, out=Operand((1, 4, 8), "int32")),
    PackBias(bias=VECTOR, out=Operand((16,), "float32")),
    PackDistances(table=Operand((2, 4, 31), "float32"), row_width=32, out=Operand((256,), "float32")),
    CastWeight(weight=SQUARE, out=Operand((8, 8), "float16")),
)


def in_graph(operator: Operator) -> Operator:
    """Return the operator with a variable in the place of each operand; the batch decides about dimensions `n`."""
    tokens = tirx.Var("n", "int64")
    names = iter(f"v{i}" for i in range(100))

    def type_of(operand: Operand) -> relax.TensorType:
        return relax.TensorType([tokens if d is None else d for d in operand.shape], operand.dtype)

    placed = operator.with_tensors(lambda operand: relax.Var(next(names), type_of(operand)))
    return dataclasses.replace(placed, out=type_of(operator.out))


def module_with(operator: Operator) -> ir.IRModule:
    """Return a module whose function `main` takes the operator's tensors and calls it."""
    builder = relax.BlockBuilder()
    with builder.function("main", list(operator.tensors)):
        with builder.dataflow():
            out = builder.emit_output(to_call(operator))
        builder.emit_func_output(out)
    return builder.finalize()
