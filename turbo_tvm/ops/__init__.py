"""Operators: the vocabulary that passes build and schedules implement, one frozen record each.

Rows are packed, `(tiles, row_tile, columns)`; before padding is removed they are `(batch, length, columns)`. Rows may
be wider than their columns. No loops here and no rewriting: `passes` and `schedules` import this room, and not each
other.
"""

from turbo_tvm.ops.attention import Attention
from turbo_tvm.ops.embedding import Embedding
from turbo_tvm.ops.gate import Gate
from turbo_tvm.ops.linear import Linear
from turbo_tvm.ops.norm import L2Normalize, Norm, Softmax
from turbo_tvm.ops.operator import Operator
from turbo_tvm.ops.pool import Pool
from turbo_tvm.ops.rotary import Rotary
from turbo_tvm.ops.rows import CastRows, TileRows, UntileRows
from turbo_tvm.ops.weights import CastWeight, PackBias, PackDistances, PackWeight

VOCABULARY: tuple[type[Operator], ...] = (
    Embedding,
    Linear,
    Gate,
    Rotary,
    Attention,
    Norm,
    L2Normalize,
    Softmax,
    Pool,
    CastRows,
    TileRows,
    UntileRows,
    PackWeight,
    PackBias,
    PackDistances,
    CastWeight,
)

__all__ = ["VOCABULARY", "Operator", *(kind.__name__ for kind in VOCABULARY)]
