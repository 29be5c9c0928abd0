"""Fragments: the 16 x 16 tiles that tensor cores multiply, `nvcuda::wmma` of every GPU from sm_70 on (bf16: sm_80).

A buffer of a `wmma` scope is an array of them. What a lane holds of one is the hardware's secret: fragments are filled,
loaded from shared memory, multiplied and stored by a warp as a whole. Macros take one as `Fragment`.
"""

from __future__ import annotations

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.block_product import FRAGMENT

Fragment = tuple[tvm.tirx.Buffer, Expr | int]  # an array of fragments, and which one


def _arguments(fragment: Fragment) -> tuple[object, ...]:
    """Return the arguments that name a fragment."""
    buffer, index = fragment
    return buffer.data, FRAGMENT, FRAGMENT, FRAGMENT, index


@T.inline
def clear_fragment(fragment):
    """Fill a fragment with zeros."""
    T.evaluate(T.tvm_fill_fragment(*_arguments(fragment), T.float32(0)))


@T.inline
def load_fragment(fragment, corner, stride, layout="row_major"):
    """Load a fragment from a tile in shared memory: its first element, and how far apart its rows lie in elements."""
    T.evaluate(T.tvm_load_matrix_sync(*_arguments(fragment), T.address_of(corner), stride, layout))


@T.inline
def store_fragment(fragment, corner, stride):
    """Store a fragment, row by row, to a tile in shared memory."""
    T.evaluate(T.tvm_store_matrix_sync(*_arguments(fragment), T.address_of(corner), stride, "row_major"))


@T.inline
def multiply_fragments(sums, a, b):
    """Add the product of two fragments to a third."""
    T.evaluate(T.tvm_mma_sync(sums[0].data, sums[1], a[0].data, a[1], b[0].data, b[1], sums[0].data, sums[1]))
