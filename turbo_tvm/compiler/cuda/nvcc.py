"""The compiler of the CUDA toolkit."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from turbo_tvm.errors import CompileError


@dataclass(frozen=True)
class Nvcc:
    """An nvcc on this machine."""

    path: str  # of the program

    def architectures(self) -> tuple[str, ...]:
        """Return what it can make machine code for, oldest first. Raises CompileError if it does not run."""
        return _architectures(self.path)

    def compile(self, source: str, architecture: str, directory: Path, options: str) -> tuple[bytes, str]:
        """Return machine code and the assembler's report. options: the assembler's. Raises CompileError."""
        path, cubin = directory / f"{architecture}.cu", directory / f"{architecture}.cubin"
        path.write_text(source)
        command = [self.path, "-O3", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", options]
        done = subprocess.run([*command, "-o", str(cubin), str(path)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"nvcc failed for {architecture}: {done.stderr.strip()[:2000]}")
        return cubin.read_bytes(), done.stderr


@lru_cache(maxsize=4)
def _architectures(path: str) -> tuple[str, ...]:
    done = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{path} does not run: {(done.stderr or done.stdout).strip()[:500]}")
    names = {name for name in done.stdout.split() if re.fullmatch(r"sm_\d+", name)}
    return tuple(sorted(names, key=lambda name: int(name[3:])))
