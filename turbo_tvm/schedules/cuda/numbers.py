"""Numbers in the formats of rows: fp32, fp16, and bf16, which travels as the `uint16` with its bits.

Arithmetic is fp32 everywhere; only storage and the operands of tensor cores are shorter.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import formats

BF16_STORAGE = formats.BF16.storage

_TO_BF16 = """
#include <cuda_bf16.h>
__forceinline__ __device__ unsigned short turbo_to_bf16(float x) {
  __nv_bfloat16 y = __float2bfloat16_rn(x);
  return *reinterpret_cast<unsigned short*>(&y);
}
"""


def to_float(value: Expr, dtype: str) -> Expr:
    """Return a scalar that is stored in that format as fp32; exact."""
    if dtype == "float32":
        return value
    if dtype == BF16_STORAGE:
        return T.reinterpret("float32", T.shift_left(T.cast(value, "uint32"), T.uint32(16)))
    return T.cast(value, "float32")


def from_float(value: Expr, dtype: str) -> Expr:
    """Return an fp32 scalar in that format, rounded to nearest even."""
    if dtype == "float32":
        return value
    if dtype == BF16_STORAGE:
        return T.cuda.func_call("turbo_to_bf16", value, source_code=_TO_BF16, return_type=BF16_STORAGE)
    return T.cast(value, dtype)
