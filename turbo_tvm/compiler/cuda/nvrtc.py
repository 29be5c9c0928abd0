"""A second compiler for GPUs: NVIDIA's runtime compiler and assembler from Python packages of CUDA 12.

    pip install 'turbo-tvm[cuda12]'

For machines without the CUDA toolkit, and for architectures that a newer toolkit has dropped: CUDA 13 knows no sm_70.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from turbo_tvm.errors import CompileError

_PACKAGES = ("cuda_runtime", "cuda_nvcc", "cuda_cccl")  # whose headers it needs
_FIRST = 70


@dataclass(frozen=True)
class Nvrtc:
    """The parts of the packages, by path."""

    library: str  # the compiler, from CUDA C to PTX
    ptxas: str  # the assembler, from PTX to machine code
    includes: tuple[str, ...]  # where headers are

    def architectures(self) -> tuple[str, ...]:
        """Return what it can make machine code for, oldest first."""
        library, count = ctypes.CDLL(self.library), ctypes.c_int()
        self._check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(library, library.nvrtcGetSupportedArchs(numbers))
        return tuple(f"sm_{n}" for n in sorted(numbers) if n >= _FIRST)

    def compile(self, source: str, architecture: str, directory: Path, options: str) -> tuple[bytes, str]:
        """Return machine code and the assembler's report, as nvcc's. options: the assembler's. Raises CompileError."""
        ptx, cubin = directory / f"{architecture}.ptx", directory / f"{architecture}.cubin"
        ptx.write_bytes(self._ptx(source, architecture))
        command = [self.ptxas, f"-arch={architecture}", "-O3", *options.split(","), str(ptx), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"ptxas failed for {architecture}: {done.stderr.strip()[:2000]}")
        return cubin.read_bytes(), done.stderr

    def _ptx(self, source: str, architecture: str) -> bytes:
        """Return the PTX of a CUDA source. Raises CompileError with the compiler's log if it refuses the source."""
        library, program = ctypes.CDLL(self.library), ctypes.c_void_p()
        name = ctypes.c_char_p(b"kernels.cu")
        self._check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name, 0, None, None))
        try:
            words = [f"--gpu-architecture=compute_{architecture[3:]}", "--std=c++17"]
            words += [f"-I{path}" for path in self.includes]
            options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
            if library.nvrtcCompileProgram(program, len(words), options) != 0:
                text = self._read(library, "ProgramLog", program).decode(errors="replace")
                raise CompileError(f"nvrtc failed for {architecture}: {text.strip()[:2000]}")
            return self._read(library, "PTX", program)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
        """Return one of the texts that the compiler keeps of a program."""
        size = ctypes.c_size_t()
        self._check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self._check(library, getattr(library, f"nvrtcGet{what}")(program, text))
        return text.value

    def _check(self, library: ctypes.CDLL, result: int) -> None:
        """Raise CompileError unless a call of the library went well."""
        if result != 0:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"nvrtc does not work: {library.nvrtcGetErrorString(result).decode()}")


@lru_cache(maxsize=1)
def find() -> Nvrtc | None:
    """Return the packages' parts, None unless all of them are installed."""
    if importlib.util.find_spec("nvidia") is None:
        return None
    for root in map(Path, importlib.import_module("nvidia").__path__):
        libraries = sorted((root / "cuda_nvrtc" / "lib").glob("libnvrtc.so.*"))
        ptxas = root / "cuda_nvcc" / "bin" / "ptxas"
        includes = tuple(str(root / name / "include") for name in _PACKAGES)
        if libraries and ptxas.exists() and all(Path(path).exists() for path in includes):
            return Nvrtc(str(libraries[0]), str(ptxas), includes)
    return None
