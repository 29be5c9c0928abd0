"""What CUDA kernels have in common in TVMScript."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script import tirx as T

from turbo_tvm.schedules.common.space import Space, Variant, checked
from turbo_tvm.schedules.cuda.numbers import BF16_STORAGE

SYNCHRONIZED = "turbo_tvm.synchronized"  # of a PrimFunc: its barriers are its own, none is to be added
ROWS_PER_BLOCK = "turbo_tvm.rows_per_block"  # of a PrimFunc: how many rows of its output a block makes

SHARED_BYTES = 48 << 10  # of shared memory, that a block may have on any GPU without asking for more


def kernel_attrs(rows: int) -> dict[str, bool | int]:
    """Return the attributes of every kernel here: no aliases, scheduled, its own barriers, rows of a block."""
    return {"tirx.noalias": True, "tirx.is_scheduled": True, SYNCHRONIZED: True, ROWS_PER_BLOCK: rows}


def only_setting(variants: Sequence[Variant], space: Space) -> dict[str, int]:
    """Return the complete setting of the one variant, the default where there is none.

    How a kernel is launched depends on its setting, so that one by the number of rows would be several kernels: raises
    ValueError for several variants.
    """
    if len(variants) > 1:
        raise ValueError(f"{len(variants)} variants: a GPU kernel has one setting for any number of rows")
    [(setting, _)] = checked(variants, space)
    return setting


def operand_type(stored: str) -> str:
    """Return the dtype of a product's operands in TVM: rows in bf16 are stored as their bits."""
    return "bfloat16" if stored == BF16_STORAGE else stored


@T.inline
def sync_block():
    """Wait for all threads of the block."""
    T.tvm_storage_sync("shared")


@T.inline
def sync_warp():
    """Wait for the threads of the warp: what one wrote to shared memory, the others may read."""
    T.evaluate(T.call_extern("int32", "__syncwarp"))
