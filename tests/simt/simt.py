"""A CUDA device for tests: runs the CUDA C that TVM emits on the host, and checks and counts what it does.

    with simt.device() as gpu:
        kernel = tvm.compile(module, target=cuda_target)
        x = tvm.runtime.tensor(array, tvm.cuda(0))
        kernel["softmax"](x, y)
        print(gpu.counts())

While the device is there, TVM's host code, its virtual machine and artifacts that are loaded use it as they would use
a GPU. A kernel that does what the programming guide leaves undefined raises RuntimeError: barriers that not all threads
of a block reach together, shuffles from lanes that are not there, accesses out of bounds or misaligned, shared memory
that is read before it is written, or used by two threads without a barrier between. See `executor.cc` for how.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simt_build
import tvm
import tvm_ffi

Sizes = tuple[int, ...]

MACHINE_CODE = b"SIMT\n"  # what "machine code" for this device begins with: the source follows
_AXES = {
    f"{kind}.{axis}": 3 * i + j for i, kind in enumerate(("blockIdx", "threadIdx")) for j, axis in enumerate("xyz")
}
_ENTRY = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')
_ALIGNED_SHARED = re.compile(r"__shared__ (alignas\(\d+\))")
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:alignas\(\d+\) |__align__\(\d+\) )?(\w+(?: \w+)?) (\w+)\[\];")
# TVM's vector of four halves: copied as one access of its size, as the vector types of CUDA are.
_FOUR_HALVES = "half4_bfloat164 {\n  T x, y, z, w;\n"
_COPIED_WHOLE = """
  half4_bfloat164(const half4_bfloat164& other) { *(uint64_t*)this = *(const uint64_t*)&other; }
  half4_bfloat164& operator=(const half4_bfloat164& other) {
    *(uint64_t*)this = *(const uint64_t*)&other;
    return *this;
  }
"""
_DYNAMIC_BYTES = 96 << 10
_ENDS = """
#pragma GCC visibility push(hidden)
extern "C" char __ehdr_start[], _end[];
extern "C" char __start_simt_shared[] __attribute__((weak)), __stop_simt_shared[] __attribute__((weak));
#pragma GCC visibility pop
extern "C" void simt_limits(char** out) {
  out[0] = __ehdr_start, out[1] = _end, out[2] = __start_simt_shared, out[3] = __stop_simt_shared;
}
"""


@dataclass(frozen=True)
class Counts:
    """What kernels did since the last `reset`.

    barriers: of blocks; barrier_arrivals: a warp at one of them. shuffles, votes, warp_barriers, mma: instructions of a
    warp, mma one per 16 x 16 x 16 tile. requests: memory instructions of a warp; sectors: 32 bytes of global memory
    that a request touches; wavefronts: passes over shared memory, of which bank_conflicts are those beyond what the
    width of an access needs.
    """

    blocks: int
    threads: int
    barriers: int
    barrier_arrivals: int
    warp_barriers: int
    shuffles: int
    votes: int
    mma: int
    global_load_requests: int
    global_load_sectors: int
    global_load_bytes: int
    global_store_requests: int
    global_store_sectors: int
    global_store_bytes: int
    shared_requests: int
    shared_wavefronts: int
    bank_conflicts: int
    atomics: int

    def __add__(self, other: Counts) -> Counts:
        """Of two runs together."""
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def global_requests(self) -> int:
        """Loads and stores."""
        return self.global_load_requests + self.global_store_requests

    @property
    def global_sectors(self) -> int:
        """Loads and stores."""
        return self.global_load_sectors + self.global_store_sectors


def _letter(argument: np.ndarray | float) -> str:
    if isinstance(argument, np.ndarray):
        return "handle"
    return "float32" if isinstance(argument, float) else "int32"


class _Graphs:
    """CUDA graphs as TVM's runtime makes them: kept by virtual machine, function and shapes, with their addresses.

    captures, replays: how many there were. Replaying with tensors that lie elsewhere than at the capture raises
    RuntimeError: a GPU would use the old addresses.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self._known: dict[tuple, list[int]] = {}

    def run_or_capture(self, machine: Any, function: Any, arguments: Any, index: int, shapes: Any = ()) -> Any:
        key = (str(machine), index, tuple(int(n) for n in shapes))
        places = [t.data_ptr() if hasattr(t, "data_ptr") else t for t in arguments]
        places = [p for p in places if isinstance(p, int)]
        if key in self._known:
            self.replays += 1
            if self._known[key] != places:
                raise RuntimeError("a CUDA graph is replayed, and its tensors lie elsewhere than when it was captured")
        else:
            self.captures += 1
            self._known[key] = places
        return tvm.get_global_func("vm.builtin.invoke_closure")(machine, function, *arguments)


class Device:
    """The device while it is there. graphs: what became of CUDA graphs."""

    def __init__(self, graphs: _Graphs):
        self.graphs = graphs

    def counts(self) -> Counts:
        """What kernels did since `reset`."""
        values = (ctypes.c_uint64 * len(fields(Counts)))()
        _executor().simt_counts(values)
        return Counts(*values)

    def reset(self) -> None:
        """Count from zero."""
        _executor().simt_reset_counts()

    def launch(self, source: str, name: str, grid: Sizes, block: Sizes, *arguments: np.ndarray | float) -> None:
        """Run a kernel of a CUDA source; arrays lie in memory of their own while it runs, and hold its results."""
        executor = _executor()
        executor.simt_allocate.restype = ctypes.c_void_p
        executor.simt_allocate.argtypes = [ctypes.c_size_t]
        executor.simt_free.argtypes = [ctypes.c_void_p]
        letters = [_letter(a) for a in arguments]
        sizes = [*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block))]
        kernel = _module(source.encode(), {name: (letters, list(_AXES))})[name]
        places = {i: executor.simt_allocate(a.nbytes) for i, a in enumerate(arguments) if isinstance(a, np.ndarray)}
        try:
            for i, place in places.items():
                ctypes.memmove(place, arguments[i].ctypes.data, arguments[i].nbytes)
            kernel(*(ctypes.c_void_p(places[i]) if i in places else a for i, a in enumerate(arguments)), *sizes)
        finally:
            for i, place in places.items():
                ctypes.memmove(arguments[i].ctypes.data, place, arguments[i].nbytes)
                executor.simt_free(place)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """While open, accesses are checked and not counted: faster by half."""
        _executor().simt_count(0)
        try:
            yield
        finally:
            _executor().simt_count(1)


@contextmanager
def device() -> Iterator[Device]:
    """While open, `tvm.cuda(0)` is the SIMT executor."""
    _executor()
    graphs = _Graphs()
    registry = {
        "ffi.Module.create.cuda": _create,
        "ffi.Module.load_from_bytes.cuda": _load,
        "vm.builtin.cuda_graph.run_or_capture": graphs.run_or_capture,
    }
    before = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in registry}
    present = tvm.get_global_func("simt.set_present")
    for name, function in registry.items():
        tvm_ffi.register_global_func(name, function, override=True)
    present(True)
    try:
        yield Device(graphs)
    finally:
        for name, function in before.items():
            if function is None:
                present(False)
                tvm_ffi.registry.remove_global_func(name)
            else:
                tvm_ffi.register_global_func(name, function, override=True)


def _create(code: Any, fmt: str, infos: Any, _source: Any) -> Any:
    """A module of kernels: what TVM asks a CUDA runtime for. code: CUDA C, or what `MACHINE_CODE` begins."""
    functions = {str(name): ([str(t) for t in f.arg_types], list(f.launch_param_tags)) for name, f in infos.items()}
    return _module(bytes(code), functions)


def _module(code: bytes, functions: dict[str, tuple[list[str], list[str]]]) -> Any:
    source = code.removeprefix(MACHINE_CODE).decode()
    library = _compile(source)
    limits = (ctypes.c_void_p * 4)()
    library.simt_limits(limits)
    kernels = {}
    for name, (types, tags) in functions.items():
        entry = ctypes.cast(getattr(library, f"simt_entry_{name}"), ctypes.c_void_p).value
        letters = "".join("p" if t == "handle" else t[0] if t.startswith("f") else "i" for t in types)
        axes = [_AXES[tag] for tag in tags if "shared" not in tag]
        kernels[name] = [letters, entry, axes]
    return tvm.get_global_func("simt.module")(kernels, source, [int(x or 0) for x in limits])


def _load(data: Any) -> Any:
    """A module from an artifact: what TVM's CUDA runtime does, down to asking the compiler for machine code."""
    stream = _Bytes(bytes(data))
    fmt, functions = stream.text(), {}
    for _ in range(stream.number(8)):
        name = stream.text()
        stream.text()
        types = [stream.dtype() for _ in range(stream.number(8))]
        tags = [stream.text() for _ in range(stream.number(8))]
        for _ in range(stream.number(8)):
            stream.number(4)
        functions[name] = (types, tags)
    code = stream.bytes()
    if fmt == "cuda":
        code = bytes(tvm.get_global_func("tvm_callback_cuda_compile")(code.decode()))
    if not code.startswith(MACHINE_CODE):
        raise RuntimeError("this is no code for the SIMT executor")
    return _module(code, functions)


class _Bytes:
    """TVM's binary form of modules: lengths in 8 bytes, little-endian."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def bytes(self) -> bytes:
        return self.take(self.number(8))

    def text(self) -> str:
        return self.bytes().decode()

    def dtype(self) -> str:
        code, bits = self.number(1), self.number(1)
        self.number(2)
        return {0: "int", 1: "uint", 2: "float", 3: "handle"}[code] + ("" if code == 3 else str(bits))


def _compile(source: str) -> ctypes.CDLL:
    entries = _ENTRY.findall(source)
    text = _DYNAMIC_SHARED.sub(rf"__shared__ alignas(128) \1 \2[{_DYNAMIC_BYTES}];", source)
    text = text.replace(_FOUR_HALVES, _FOUR_HALVES + _COPIED_WHOLE)
    text = _ALIGNED_SHARED.sub(r"\1 __shared__", text)
    calls = "".join(
        f'extern "C" void simt_entry_{name}(void** args) {{ simt::call({name}, args); }}\n' for name in set(entries)
    )
    _executor()
    return ctypes.CDLL(str(simt_build.kernels(text + calls + _ENDS)), mode=ctypes.RTLD_LOCAL)


@lru_cache(maxsize=1)
def _executor() -> ctypes.CDLL:
    """The executor and the device, for the whole process: TVM keeps the device that it was once given."""
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        pytest.skip("TVM has a real GPU here, and knows one device of a kind: scripts/gpu_check is for this machine")
    ctypes.CDLL(str(Path(tvm_ffi.__file__).parent / "lib" / "libtvm_ffi.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(simt_build.executor()), mode=ctypes.RTLD_GLOBAL)
