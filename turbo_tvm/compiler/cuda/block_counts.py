"""How often a block of a CUDA kernel meets: its barriers and shuffles, counted in the lowered code.

Loops of known length multiply; what lies in a loop whose length the batch decides, such as that over keys, is counted
per step of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tvm
from tvm import ir, tirx

from turbo_tvm.schedules.cuda.script import ROWS_PER_BLOCK

_BARRIER, _SHUFFLE = "tirx.tvm_storage_sync", "tirx.tvm_warp_shuffle"
_OPERANDS = ("value", "indices", "args", "a", "b", "condition", "true_value", "false_value")  # fields of expressions


@dataclass(frozen=True)
class BlockCounts:
    """What one block of a kernel does; a step is one of a loop whose length the batch decides."""

    rows: int = 0  # of the output, that the block makes; 0 if that is not known
    threads: int = 1
    barriers: int = 0  # that all threads take part in, outside such loops
    barriers_per_step: int = 0
    shuffles: int = 0  # instructions of a warp, outside such loops
    shuffles_per_step: int = 0
    dynamic_shared_bytes: int = 0  # shared memory that is asked for at launch


def count(func: tirx.PrimFunc) -> BlockCounts:
    """Return the counts of a kernel before host and device code are split; a function without threads has none."""
    found: Counter[str] = Counter()
    _walk(func.body, 1, False, found)
    threads = max(1, found["threads"])
    warps = -(-threads // 32)
    return BlockCounts(
        int(dict(func.attrs or {}).get(ROWS_PER_BLOCK, 0)),
        threads,
        found["barrier"],
        found["barrier per step"],
        found["shuffle"] * warps,
        found["shuffle per step"] * warps,
        found["dynamic"],
    )


def _walk(stmt: tirx.Stmt, times: int, stepping: bool, found: Counter[str]) -> None:
    """Add what a statement does to what was found. times: how often it runs; stepping: within a loop of any length."""
    if isinstance(stmt, tirx.SeqStmt):
        for part in stmt.seq:
            _walk(part, times, stepping, found)
    elif isinstance(stmt, tirx.For):
        known = isinstance(stmt.extent, tirx.IntImm)
        _walk(stmt.body, times * int(stmt.extent) if known else times, stepping or not known, found)
    elif isinstance(stmt, tirx.IfThenElse):  # a warp may take either way; barriers are in neither
        _walk(stmt.then_case, times, stepping, found)
        if stmt.else_case is not None:
            _walk(stmt.else_case, times, stepping, found)
    elif hasattr(stmt, "body") and isinstance(stmt.body, tirx.Stmt):
        _declaration(stmt, found)
        _walk(stmt.body, times, stepping, found)
    elif isinstance(stmt, tirx.AllocBuffer):
        _declaration(stmt, found)
    else:
        _expressions(stmt, times, stepping, found)


def _declaration(stmt: tirx.Stmt, found: Counter[str]) -> None:
    """Add the threads that a statement binds, or the shared memory that it asks for at launch."""
    if isinstance(stmt, tirx.AttrStmt):
        threads = stmt.attr_key == "thread_extent" and str(stmt.node.thread_tag).startswith("threadIdx")
        if threads and isinstance(stmt.value, tirx.IntImm):
            found["threads"] = max(1, found["threads"]) * int(stmt.value)
    elif isinstance(stmt, tirx.AllocBuffer) and stmt.buffer.scope() == "shared.dyn":
        itemsize = tvm.DataType(str(stmt.buffer.dtype)).itemsize
        found["dynamic"] += itemsize * _product(stmt.buffer.shape)


def _expressions(stmt: tirx.Stmt, times: int, stepping: bool, found: Counter[str]) -> None:
    """Add the barriers and shuffles among a statement's expressions to what was found; otherwise as `_walk`."""
    suffix, pending = " per step" if stepping else "", [stmt]
    while pending:
        node: Any = pending.pop()
        name = str(getattr(getattr(node, "op", None), "name", ""))
        if name == _BARRIER and str(node.args[0].value).startswith("shared"):
            found["barrier" + suffix] += times
        elif name.startswith(_SHUFFLE):
            found["shuffle" + suffix] += times
        for field in _operands(type(node)):  # type: ignore[arg-type]
            operand = getattr(node, field)
            if isinstance(operand, ir.Expr):
                pending.append(operand)
            elif operand is not None and not isinstance(operand, str | int | float):
                pending.extend(part for part in operand if isinstance(part, ir.Expr))


@lru_cache(maxsize=128)
def _operands(kind: Any) -> tuple[str, ...]:
    """Return the fields of nodes of that type that hold expressions; asking TVM's objects every time is slow."""
    return tuple(name for name in _OPERANDS if hasattr(kind, name))


def _product(shape: Sequence[Any]) -> int:
    """Return how many elements a shape has, whose extents are known."""
    return math.prod(int(extent) for extent in shape)
