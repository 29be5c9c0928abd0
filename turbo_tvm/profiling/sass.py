"""Instructions in machine code for a GPU, counted with NVIDIA's disassembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from turbo_tvm.errors import TurboError

_FUNCTION = re.compile(r"\.text\.(\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
# Instructions worth showing: tensor cores, fused multiply-adds, shuffles, barriers, and local memory, where spills go.
_SHOWN = {"HMMA": "HMMA", "FFMA": "FFMA", "SHFL": "SHFL", "BAR": "BAR", "LDL": "local loads", "STL": "local stores"}


def instructions(nvdisasm: str, cubin: bytes) -> dict[str, Counter[str]]:
    """Count the instructions of every kernel, by their first word. Raises TurboError if the disassembler fails."""
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:
        path = Path(directory) / "code.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TurboError(f"nvdisasm cannot read the machine code: {done.stderr.strip()[:500]}")
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        function = _FUNCTION.match(line.strip())
        if function:
            current = found.setdefault(function[1].removesuffix("_kernel"), Counter())
            continue
        instruction = _INSTRUCTION.search(line)
        if instruction:
            current[instruction[1]] += 1
    return found


def summary(counts: Counter[str]) -> str:
    """Describe the counts of a kernel in a few words."""
    shown = [f"{counts[word]} {name}" for word, name in _SHOWN.items() if counts[word]]
    return ", ".join([f"{counts.total():,} instructions", *shown])
