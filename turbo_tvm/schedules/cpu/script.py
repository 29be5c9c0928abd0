"""What the CPU kernels add to TVMScript: prefetches, sums in a tree, optional parameters."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

CACHE_LINE_BYTES = 64
CACHE_LINE_FLOATS = 16

# TVM cannot call LLVM's intrinsic, which is overloaded on a pointer type. The memory attribute says that no
# variable changes: without it LLVM stores a tile's accumulators after each prefetch.
CPU_LLVM = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define i32 @turbo_prefetch_read(ptr %base, i64 %index) alwaysinline nounwind {
  %address = getelementptr i8, ptr %base, i64 %index
  call void @llvm.prefetch.p0(ptr %address, i32 0, i32 2, i32 1) memory(inaccessiblemem: readwrite)
  ret i32 0
}

define i32 @turbo_prefetch_near(ptr %base, i64 %index) alwaysinline nounwind {
  %address = getelementptr i8, ptr %base, i64 %index
  call void @llvm.prefetch.p0(ptr %address, i32 0, i32 3, i32 1) memory(inaccessiblemem: readwrite)
  ret i32 0
}

declare float @llvm.vector.reduce.fadd.v4f32(float, <4 x float>)

define float @turbo_sum_4(<4 x float> %v) alwaysinline nounwind readnone {
  %sum = call reassoc float @llvm.vector.reduce.fadd.v4f32(float -0.0, <4 x float> %v)
  ret float %sum
}

declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)

define float @turbo_sum_8(<8 x float> %v) alwaysinline nounwind readnone {
  %sum = call reassoc float @llvm.vector.reduce.fadd.v8f32(float -0.0, <8 x float> %v)
  ret float %sum
}

declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)

define float @turbo_sum_16(<16 x float> %v) alwaysinline nounwind readnone {
  %sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %v)
  ret float %sum
}
"""


def prefetch_read(buffer: tvm.tirx.Buffer, index: Expr) -> Expr:
    """Bring the cache line of an element of a buffer, by its flat index, into L2; any address is allowed.

    The statement must stand inside `T.attr(T.int32(0), "pragma_import_llvm", CPU_LLVM)`.
    """
    return _prefetch("read", buffer, index)


def prefetch_near(buffer: tvm.tirx.Buffer, index: Expr) -> Expr:
    """Bring it into L1 in the same way."""
    return _prefetch("near", buffer, index)


def _prefetch(where: str, buffer: tvm.tirx.Buffer, index: Expr) -> Expr:
    """Call one of the two functions above."""
    offset = T.cast(index, "int64") * tvm.DataType(str(buffer.dtype)).itemsize
    return T.evaluate(T.call_extern("int32", f"turbo_prefetch_{where}", buffer.data, offset))


def lane_sum(vector: Expr, lanes: int) -> Expr:
    """Return the sum over the lanes of an fp32 vector, halves first; under the same attribute."""
    return T.call_pure_extern("float32", f"turbo_sum_{lanes}", vector)


def tree_sum(terms: Sequence[Expr]) -> Expr:
    """Return the sum of the terms in logarithmic depth: LLVM keeps the order of fp32 additions as it is written."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    pairs = [terms[i] + terms[i + half] for i in range(half)]
    return tree_sum([*pairs, *terms[2 * half :]])


def without_parameters(prim_func: tvm.tirx.PrimFunc, names: Sequence[str]) -> tvm.tirx.PrimFunc:
    """Return the function without the parameters of those names, which its body must not use.

    One TVMScript source serves every combination of optional inputs this way.
    """
    kept = [param for param in prim_func.params if param.name not in names]
    return tvm.tirx.PrimFunc(kept, prim_func.body, prim_func.ret_type, prim_func.attrs)
