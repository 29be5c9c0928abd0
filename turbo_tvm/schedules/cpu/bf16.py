"""bf16 on the CPU: storage as 16-bit integers, dot products of pairs.

TVM's LLVM code generator has no bf16 vectors, so a bf16 number travels as the `uint16` with its bits, and a pair of
neighbours as an `int32`. Reading one is a shift; writing one rounds to nearest, ties to even, as the CPU's own
conversion does. The pair product of AVX512-BF16 (`vdpbf16ps`: c + a0 b0 + a1 b1 per lane, fp32 accumulation) is LLVM IR
that is linked into the kernel.
"""

from __future__ import annotations

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from turbo_tvm.ops import formats

STORAGE = formats.BF16.storage
PAIR = formats.BF16.word or STORAGE

DOT_LLVM = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @turbo_dot_bf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind readnone {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""

PACK_LLVM = """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)

define <16 x i16> @turbo_pack_bf16(<16 x float> %v) alwaysinline nounwind readnone {
  %r = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %v)
  %b = bitcast <16 x bfloat> %r to <16 x i16>
  ret <16 x i16> %b
}
"""


def packed(values: Expr) -> Expr:
    """Return the bits of the bf16 numbers nearest to 16 fp32 values, ties to even, in one instruction.

    Denormals give zeros. The statement must stand inside `T.attr(T.int32(0), "pragma_import_llvm", PACK_LLVM)`.
    """
    return T.call_pure_extern("uint16x16", "turbo_pack_bf16", values)


def dot(c: Expr, a: Expr, b: Expr) -> Expr:
    """Return c + a0 b0 + a1 b1 in each of 16 lanes: c fp32, a and b pairs as int32; 16 lanes each.

    The statement must stand inside `T.attr(T.int32(0), "pragma_import_llvm", DOT_LLVM)`.
    """
    return T.call_pure_extern("float32x16", "turbo_dot_bf16", c, a, b)


def widened(bits: Expr) -> Expr:
    """Return bf16 bits as the low half of a uint32. Any number of lanes."""
    return T.cast(bits, _like(bits, "uint32"))


def to_float(bits: Expr) -> Expr:
    """Return the fp32 value of bf16 bits, exact. uint16 in, any number of lanes."""
    wide = _like(bits, "uint32")
    return T.reinterpret(_like(bits, "float32"), T.shift_left(T.cast(bits, wide), T.uint32(16)))


def from_float(value: Expr) -> Expr:
    """Return the bits of the bf16 number nearest to an fp32 value, ties to even; overflow gives infinity."""
    return T.cast(T.shift_right(_rounded(value), T.uint32(16)), _like(value, STORAGE))


def pair(low: Expr, high: Expr) -> Expr:
    """Return two fp32 values as one int32 of bf16 numbers."""
    upper = T.bitwise_and(_rounded(high), T.uint32(0xFFFF0000))
    return T.reinterpret(_like(low, PAIR), T.bitwise_or(upper, T.shift_right(_rounded(low), T.uint32(16))))


def pair_half_up(low: Expr, high: Expr) -> Expr:
    """Return the same for finite values with half the instructions: ties are rounded away from zero."""
    half = T.uint32(0x8000)
    upper = T.bitwise_and(_bits(high) + half, T.uint32(0xFFFF0000))
    return T.reinterpret(_like(low, PAIR), T.bitwise_or(upper, T.shift_right(_bits(low) + half, T.uint32(16))))


def load(buffer: tvm.tirx.Buffer, *index: Expr) -> Expr:
    """Return an element as fp32, whether the buffer holds fp32 or bf16."""
    value = buffer[index]
    return value if str(buffer.dtype) == "float32" else to_float(value)


def stored(buffer: tvm.tirx.Buffer, value: Expr) -> Expr:
    """Return an fp32 value in the buffer's own format."""
    return value if str(buffer.dtype) == "float32" else from_float(value)


def _rounded(value: Expr) -> Expr:
    """Return the bits of an fp32 value, so that their upper half is the bf16 number nearest to it."""
    bits = _bits(value)
    odd = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
    return bits + (odd + T.uint32(0x7FFF))


def _bits(value: Expr) -> Expr:
    """Return the bits of an fp32 value."""
    return T.reinterpret(_like(value, "uint32"), value)


def _like(value: Expr, dtype: str) -> str:
    """Return that scalar type with the lanes of the value."""
    lanes = str(value.ty).partition("x")[2]
    return f"{dtype}x{lanes}" if lanes else dtype
