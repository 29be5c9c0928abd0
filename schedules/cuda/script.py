"""What CUDA kernels have in common in TVMScript."""

from __future__ import annotations

from tvm.script import tirx as T

from turbo_tvm.schedules.cuda.numbers import BF16_STORAGE

SYNCHRONIZED = "turbo_tvm.synchronized"  # of a PrimFunc: its barriers are its own, none is to be added
ROWS_PER_BLOCK = "turbo_tvm.rows_per_block"  # of a PrimFunc: how many rows of its output a block makes


def kernel_attrs(rows: int) -> dict[str, bool | int]:
    """Of every kernel here: no aliases, not to be scheduled by anyone else, its own barriers, rows of a block."""
    return {"tirx.noalias": True, "tirx.is_scheduled": True, SYNCHRONIZED: True, ROWS_PER_BLOCK: rows}


def operand_type(stored: str) -> str:
    """The dtype of a product's operands in TVM: rows in bf16 are stored as their bits."""
    return "bfloat16" if stored == BF16_STORAGE else stored


@T.inline
def sync_block():
    """A barrier for all threads of the block."""
    T.tvm_storage_sync("shared")


@T.inline
def sync_warp():
    """A barrier for the threads of the warp: what one wrote to shared memory, the others may read."""
    T.evaluate(T.call_extern("int32", "__syncwarp"))
