"""What CUDA kernels have in common in TVMScript."""

from __future__ import annotations

SYNCHRONIZED = "turbo_tvm.synchronized"  # of a PrimFunc: its barriers are its own, none is to be added

# Of every kernel here: no aliases, not to be scheduled by anyone else, and its own barriers.
KERNEL_ATTRS = {"tirx.noalias": True, "tirx.is_scheduled": True, SYNCHRONIZED: True}
