"""A machine with a GPU, which is the SIMT executor, and a compiler for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import simt

from turbo_tvm.compiler.cuda import machine_code
from turbo_tvm.compiler.cuda.block_counts import BlockCounts


def compile_source(source: str, architectures: Sequence[str], _counts: Mapping[str, BlockCounts]):
    """In place of nvcc: what the SIMT executor takes for machine code is the source."""
    cubins = {name: simt.MACHINE_CODE + source.encode() for name in architectures}
    return machine_code.DeviceCode(cubins, (), hashlib.sha256(source.encode()).hexdigest())


@contextmanager
def compiler() -> Iterator[None]:
    """While open, CUDA targets are compiled for the executor, whatever is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_code, "compile_source", compile_source)
        patch.setattr(machine_code, "choose_compilers", lambda names: {})
        yield


@contextmanager
def machine() -> Iterator[simt.Device]:
    """While open, there are the GPU and its compiler."""
    with compiler(), simt.device() as device:
        device.reset()
        yield device
