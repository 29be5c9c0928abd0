"""Compile one kernel and run it on NumPy arrays, in fp32 or bf16, with AMX's tiles or an emulation of them."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm
from each_choice import mark_the_others_slow
from tvm.support import cc
from tvm.target import codegen

from turbo_tvm.compiler import targets
from turbo_tvm.runtime.device.cpu_features import request_amx
from turbo_tvm.schedules.common.space import Space, Variant
from turbo_tvm.schedules.cpu import amx

HERE = Path(__file__).parent
KERNEL = "kernel"
FP32, BF16 = "float32", "uint16"
GUARD_BYTES = 4096
POISON = 0xFF  # as a byte; numbers made of it are NaN, or -1


@dataclass(frozen=True)
class Arithmetic:
    """A CPU, and how rows and weights are stored there: "float32", or "uint16" for bf16."""

    target: tvm.target.Target
    dtype: str

    @property
    def bf16(self) -> bool:
        return self.dtype == BF16

    def even(self, columns: int) -> int:
        """So many columns, or one more where they come in pairs."""
        return columns + columns % 2 if self.bf16 else columns


@dataclass(frozen=True)
class TileUse:
    """What the emulated instructions were used for: see `amx_report` in `amx_emulation.cc`."""

    fault: str
    active: int
    products: int
    x_bytes: int
    weight_bytes: int
    repeated: int


@dataclass(frozen=True)
class TileMachine:
    """Tile instructions as LLVM IR: this machine's, or functions that do the same and judge how they are used.

    report: what happened since it was called last; None on this machine.
    """

    instructions: str
    report: Callable[[], TileUse] | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A kernel for each combination of sizes and formats takes seconds to compile: the quick tests take fewer."""
    mark_the_others_slow(item for item in items if item.path.is_relative_to(HERE))


@functools.cache
def host() -> tvm.target.Target:
    """This machine's CPU as `compile` sees it."""
    return targets.resolve("cpu")


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
def bf16_target() -> tvm.target.Target:
    """This machine's CPU, if it multiplies bf16."""
    if not _has(host(), "avx512bf16"):
        pytest.skip("needs a CPU with AVX512-BF16")
    return host()


ARITHMETICS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("fp32", "fp32-avx2", "bf16")]


@pytest.fixture(params=ARITHMETICS)
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    """Every way in which this machine can multiply; tests of one share what they compile."""
    name = {"fp32": "host_target", "fp32-avx2": "avx2_target", "bf16": "bf16_target"}[request.param]
    return Arithmetic(request.getfixturevalue(name), BF16 if request.param == "bf16" else FP32)


@pytest.fixture(scope="session")
def emulated_tiles(tmp_path_factory: pytest.TempPathFactory) -> TileMachine:
    """The tile instructions in memory; code that TVM compiles in this process finds them."""
    library = tmp_path_factory.mktemp("amx") / "amx_emulation.so"
    source = Path(__file__).with_name("amx_emulation.cc")
    subprocess.run([cc.get_cc(), "-O2", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def report() -> TileUse:
        counts, text = (ctypes.c_int64 * 5)(), ctypes.create_string_buffer(100)
        loaded.amx_report(counts, text, ctypes.c_int64(100))
        return TileUse(text.value.decode(), *counts)

    return TileMachine(amx.LLVM.replace("llvm.x86.", "amx_emulated_").replace(" immarg", ""), report)


@pytest.fixture(scope="session")
def real_tiles() -> TileMachine:
    """This machine's tiles, if it has them and the system grants them."""
    if not _has(host(), amx.FEATURE):
        pytest.skip("needs a CPU with AMX")
    request_amx(targets.describe("cpu", host()))
    return TileMachine(amx.LLVM)


TILES = [pytest.param(f"{name}_tiles", marks=pytest.mark.xdist_group(f"{name}-tiles")) for name in ("emulated", "real")]


@pytest.fixture(params=TILES)
def tile_machine(request: pytest.FixtureRequest) -> TileMachine:
    """Every way in which tile instructions run here; tests of one share what they compile."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def stored() -> Callable[..., np.ndarray]:
    """`stored(values, dtype, width=None)`: fp32 values as rows in memory; what is wider than the values is poisoned."""

    def store(values: np.ndarray, dtype: str, width: int | None = None) -> np.ndarray:
        columns = values.shape[-1]
        rows = poisoned((*values.shape[:-1], width or columns), dtype)
        rows[..., :columns] = values if dtype == FP32 else values.astype(ml_dtypes.bfloat16).view(BF16)
        return rows

    return store


@pytest.fixture(scope="session")
def loaded() -> Callable[..., np.ndarray]:
    """`loaded(rows, columns)`: the values of rows in memory in float64; fails if a kernel wrote beyond its columns."""

    def load(rows: np.ndarray, columns: int) -> np.ndarray:
        assert (np.ascontiguousarray(rows[..., columns:]).view("uint8") == POISON).all(), "columns beyond the last"
        values = np.ascontiguousarray(rows[..., :columns])
        return (values if rows.dtype == FP32 else values.view(ml_dtypes.bfloat16)).astype("float64")

    return load


@pytest.fixture(scope="session")
def neon_target() -> tvm.target.Target:
    """A 64-bit ARM server. Tests compile for it and read the assembly; they do not run it."""
    return tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"})


def _has(target: tvm.target.Target, feature: str) -> bool:
    with target:
        return codegen.target_has_features(feature)


@pytest.fixture(scope="session")
def run_kernel() -> Callable[..., np.ndarray]:
    """`run_kernel(prim_func, inputs, out_shape, target=None)`: the filled output, the last argument.

    The output starts poisoned, so that an element that the kernel forgets to write fails its test, and lies between
    guards, so that one that it writes beyond the end fails as well. `out`: what it starts with instead; if it is one of
    the inputs, the kernel works in place.
    """
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
        dtype: str = FP32,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        kernel = compile_once(prim_func, target or host())
        memory, result = guarded(out_shape, dtype)
        if out is not None:
            result[...] = out
        filled = tvm.runtime.from_dlpack(result)
        kernel(*(filled if array is out else tvm.runtime.tensor(array) for array in inputs), filled)
        assert (memory[:GUARD_BYTES] == POISON).all() and (memory[-GUARD_BYTES:] == POISON).all(), "out of bounds"
        return result.copy()

    return run


def poisoned(shape: Sequence[int], dtype: str) -> np.ndarray:
    return np.full((*shape, np.dtype(dtype).itemsize), POISON, "uint8").view(dtype)[..., 0]


def guarded(shape: Sequence[int], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Poisoned bytes, and the array in their middle, aligned to a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 2 * GUARD_BYTES + 64, POISON, "uint8")
    memory = memory[-memory.ctypes.data % 64 :][: size + 2 * GUARD_BYTES]
    return memory, memory[GUARD_BYTES : GUARD_BYTES + size].view(dtype).reshape(shape)


@pytest.fixture(scope="session")
def assembly() -> Callable[..., str]:
    """`assembly(prim_func, target)`: the text that LLVM emits; nothing runs."""
    return lambda prim_func, target: build(prim_func, tvm.target.Target(target)).mod.inspect_source("asm")


@pytest.fixture(scope="session")
def extremes() -> Callable[[Space], list[Variant]]:
    """`extremes(space)`: the least and the largest value of each knob that has a choice, with few other changes."""

    def nearest(space: Space, name: str, pick: Callable[..., int]) -> Variant:
        settings = list(space.settings())
        value = pick(setting[name] for setting in settings)
        having = [setting for setting in settings if setting[name] == value]
        changes = [sum(s[other] != usual for other, usual in space.default.items()) for s in having]
        return Variant(tuple(having[changes.index(min(changes))].items()))

    def of(space: Space) -> list[Variant]:
        found = [nearest(space, knob.name, pick) for knob in space.knobs for pick in (min, max)]
        return list(dict.fromkeys(found))

    return of
