"""Intel AMX: tiles of 16 rows of 64 bytes, and the product of two of them in bf16.

A product of 32 rows and 32 columns takes all eight tiles: 0-3 accumulate (0 and 1 the upper 16 rows, 2 and 3 the
lower), 4 and 5 hold x (upper, lower), 6 and 7 the weight (left, right). Weights lie as the instruction wants them: a
row of a panel is 32 pairs along k. A thread configures its tiles before it uses them and releases them after;
configuring clears them. An instruction names its tiles in its own bits, hence one function of LLVM IR for each.

Every statement must stand inside `T.attr(T.int32(0), "pragma_import_llvm", LLVM)`. The system grants tiles to a process
that asks for them: `runtime/cpu_features.py`.

Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18; volume 2, TDPBF16PS.
"""

from __future__ import annotations

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

ROWS = 16  # rows of a tile
PAIRS = 16  # 32-bit elements of a row: pairs of bf16, or fp32
FEATURE = "amx-bf16"  # LLVM's name

_ROW_BYTES = 64
_DOTS = ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))

_DECLARATIONS = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
"""


def _function(name: str, parameters: str, instruction: str) -> str:
    """Return LLVM IR of a function for an instruction; one that goes to memory has an address."""
    address = "  %address = getelementptr i8, ptr %base, i64 %offset\n" if "%address" in instruction else ""
    return (
        f"\ndefine i32 @turbo_amx_{name}({parameters}) alwaysinline nounwind {{\n"
        f"{address}  call void @llvm.x86.{instruction}\n  ret i32 0\n}}\n"
    )


_BLOCK = "ptr %base, i64 %offset, i64 %stride"
LLVM = "".join(
    [
        _DECLARATIONS,
        _function("configure", "ptr %shapes", "ldtilecfg(ptr %shapes)"),
        _function("release", "", "tilerelease()"),
        *(_function(f"zero_{i}", "", f"tilezero(i8 {i})") for i in range(4)),
        *(_function(f"load_{i}", _BLOCK, f"tileloadd64(i8 {i}, ptr %address, i64 %stride)") for i in range(8)),
        *(_function(f"store_{i}", _BLOCK, f"tilestored64(i8 {i}, ptr %address, i64 %stride)") for i in range(4)),
        *(_function(f"dot_{c}_{a}_{b}", "", f"tdpbf16ps(i8 {c}, i8 {a}, i8 {b})") for c, a, b in _DOTS),
    ]
)


def _fields(bits: int, *values: Expr | int) -> Expr:
    """Return small numbers side by side in one word, the first lowest."""
    return sum((T.cast(value, "int64") * T.int64(1 << (bits * i)) for i, value in enumerate(values)), T.int64(0))


@T.inline
def configure(shapes, upper, lower, pairs):
    """Give the tiles their shapes, all zeros in them: `upper` and `lower` rows of x, `pairs` along k.

    shapes: int64 `(8,)`, scratch. Where lower is 0, tiles 2, 3 and 5 do not exist.
    """
    below = T.meta_var(T.if_then_else(lower > 0, T.int64(1), T.int64(0)))
    shapes[0] = T.int64(1)  # palette 1: eight tiles
    shapes[1] = T.int64(0)
    shapes[2] = _fields(16, _ROW_BYTES, _ROW_BYTES, below * _ROW_BYTES, below * _ROW_BYTES)
    shapes[3] = _fields(16, 4 * pairs, below * (4 * pairs), _ROW_BYTES, _ROW_BYTES)
    shapes[4] = T.int64(0)
    shapes[5] = T.int64(0)
    shapes[6] = _fields(8, upper, upper, lower, lower, upper, lower, pairs, pairs)
    shapes[7] = T.int64(0)
    T.evaluate(T.call_extern("int32", "turbo_amx_configure", shapes.data))


def release() -> Expr:
    """Leave the tiles to nobody: a thread that keeps them pays for them at every switch."""
    return _call("release")


def zero(tile: int) -> Expr:
    """Clear a tile."""
    return _call(f"zero_{tile}")


def load(tile: int, buffer: tvm.tirx.Buffer, offset: Expr, stride: int) -> Expr:
    """Fill a tile from a buffer: where its first element lies and how far apart rows are, in elements."""
    return _call(f"load_{tile}", buffer.data, *_in_bytes(buffer, offset, stride))


def store(tile: int, buffer: tvm.tirx.Buffer, offset: Expr, stride: int) -> Expr:
    """Store a tile to a buffer, which is laid out in the same way."""
    return _call(f"store_{tile}", buffer.data, *_in_bytes(buffer, offset, stride))


def dot(c: int, a: int, b: int) -> Expr:
    """Add to tile c: tile a times tile b, for those of `_DOTS`: pairs of bf16, fp32 accumulation."""
    return _call(f"dot_{c}_{a}_{b}")


def _call(name: str, *arguments: Expr) -> Expr:
    """Call a function of `LLVM`."""
    return T.evaluate(T.call_extern("int32", f"turbo_amx_{name}", *arguments))


def _in_bytes(buffer: tvm.tirx.Buffer, offset: Expr, stride: int) -> tuple[Expr, Expr]:
    """Return an offset and a stride in bytes."""
    size = tvm.DataType(str(buffer.dtype)).itemsize
    return T.cast(offset, "int64") * size, T.int64(stride * size)
