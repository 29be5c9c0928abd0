"""Compile one kernel and run it on NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm.target import codegen

KERNEL = "kernel"


def host() -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})


def build(prim_func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.runtime.Executable:
    module = tvm.IRModule({KERNEL: prim_func.with_attr("global_symbol", KERNEL)})
    return tvm.compile(module, target=target)


@pytest.fixture(scope="session")
def host_target() -> tvm.target.Target:
    """This machine's CPU."""
    return host()


@pytest.fixture(scope="session")
def avx2_target() -> tvm.target.Target:
    """AVX2 + FMA without AVX-512."""
    if "x86_64" not in codegen.llvm_get_system_triple() or not _has(host(), "avx2"):
        pytest.skip("needs an x86 CPU with AVX2")
    return tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})


@pytest.fixture(scope="session")
def neon_target() -> tvm.target.Target:
    """A 64-bit ARM server. Tests compile for it and read the assembly; they do not run it."""
    return tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"})


def _has(target: tvm.target.Target, feature: str) -> bool:
    with target:
        return codegen.target_has_features(feature)


@pytest.fixture(scope="session")
def run_kernel() -> Callable[..., np.ndarray]:
    """`run_kernel(prim_func, inputs, out_shape, target=None)`: the filled output, the last argument."""
    # Read when TVM's thread pool starts; without it a machine with two logical cores gets one thread.
    os.environ.setdefault("TVM_NUM_THREADS", "2")
    compiled: dict[tuple[int, str], tuple[tvm.tirx.PrimFunc, Callable[..., None]]] = {}

    def compile_once(prim_func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Callable[..., None]:
        key = id(prim_func), str(target)
        if key not in compiled:
            compiled[key] = prim_func, build(prim_func, target)[KERNEL]  # holding prim_func keeps its id taken
        return compiled[key][1]

    def run(
        prim_func: tvm.tirx.PrimFunc,
        inputs: Sequence[np.ndarray],
        out_shape: Sequence[int],
        target: tvm.target.Target | None = None,
        dtype: str = "float32",
    ) -> np.ndarray:
        kernel = compile_once(prim_func, target or host())
        # Poisoned, so that an element that the kernel forgets to write fails its test.
        poison = np.full(out_shape, np.nan if dtype.startswith("float") else -1, dtype)
        arguments = [tvm.runtime.tensor(array) for array in (*inputs, poison)]
        kernel(*arguments)
        return arguments[-1].numpy()

    return run


@pytest.fixture(scope="session")
def assembly() -> Callable[..., str]:
    """`assembly(prim_func, target)`: the text that LLVM emits; nothing runs."""
    return lambda prim_func, target: build(prim_func, tvm.target.Target(target)).mod.inspect_source("asm")
