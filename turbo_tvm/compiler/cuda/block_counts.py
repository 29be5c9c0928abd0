"""How often a block of a CUDA kernel meets: its barriers and shuffles, counted in the lowered code.

Loops of known length multiply; what lies in a loop whose length the batch decides, such as that over keys, is counted
per step of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, tirx

from turbo_tvm.schedules.cuda.script import ROWS_PER_BLOCK

_BARRIER, _SHUFFLE = "tirx.tvm_storage_sync", "tirx.tvm_warp_shuffle"
_OPERANDS = ("value", "indices", "args", "a", "b", "condition", "true_value", "false_value")  # fields of expressions
_fields: dict[type, tuple[str, ...]] = {}  # those that nodes of a type have; asking TVM's objects is slow


@dataclass(frozen=True)
class BlockCounts:
    """Of one block: barriers that all its threads take part in, shuffles as instructions of a warp; once, and per step.

    rows: of the output, that the block makes; 0 if that is not known. dynamic_shared_bytes: shared memory that is asked
    for at launch.
    """

    rows: int = 0
    threads: int = 1
    barriers: int = 0
    barriers_per_step: int = 0
    shuffles: int = 0
    shuffles_per_step: int = 0
    dynamic_shared_bytes: int = 0


def count(func: tirx.PrimFunc) -> BlockCounts:
    """Count a kernel before host and device code are split; a function without threads has none."""
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
    elif isinstance(stmt, tirx.AttrStmt):
        threads = stmt.attr_key == "thread_extent" and str(stmt.node.thread_tag).startswith("threadIdx")
        if threads and isinstance(stmt.value, tirx.IntImm):
            found["threads"] = max(1, found["threads"]) * int(stmt.value)
        _walk(stmt.body, times, stepping, found)
    elif isinstance(stmt, tirx.AllocBuffer):
        if stmt.buffer.scope() == "shared.dyn":
            itemsize = tvm.DataType(str(stmt.buffer.dtype)).itemsize
            found["dynamic"] += itemsize * _product(stmt.buffer.shape)
        if hasattr(stmt, "body"):
            _walk(stmt.body, times, stepping, found)
    elif hasattr(stmt, "body") and isinstance(stmt.body, tirx.Stmt):
        _walk(stmt.body, times, stepping, found)
    else:
        _expressions(stmt, times, stepping, found)


def _expressions(stmt: tirx.Stmt, times: int, stepping: bool, found: Counter[str]) -> None:
    suffix, pending = " per step" if stepping else "", [stmt]
    while pending:
        node: Any = pending.pop()
        name = str(getattr(getattr(node, "op", None), "name", ""))
        if name == _BARRIER and str(node.args[0].value).startswith("shared"):
            found["barrier" + suffix] += times
        elif name.startswith(_SHUFFLE):
            found["shuffle" + suffix] += times
        kind = type(node)
        if kind not in _fields:
            _fields[kind] = tuple(name for name in _OPERANDS if hasattr(node, name))
        for field in _fields[kind]:
            operand = getattr(node, field)
            if isinstance(operand, ir.Expr):
                pending.append(operand)
            elif operand is not None and not isinstance(operand, str | int | float):
                pending.extend(part for part in operand if isinstance(part, ir.Expr))


def _product(shape: list) -> int:
    total = 1
    for extent in shape:
        total *= int(extent)
    return total
