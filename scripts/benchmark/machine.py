"""What the figures were measured on."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "turbo_tvm"
PACKAGES = ("turbo-tvm", "apache-tvm", "torch", "transformers", "onnx", "onnxruntime", "openvino", "numpy")
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16")


def describe(threads: int) -> dict[str, Any]:
    """The machine, the versions and the compiler's sources: results with equal descriptions may stand together."""
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_features": [f for f in FEATURES if f in (_cpu_field("flags") or _cpu_field("Features") or "").split()],
        "logical_cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "threads": threads,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "sources": sources(ROOT),
    }


def revision() -> str | None:
    """The commit that was measured, with a mark if the tree differs from it."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def measured_by(command: str, threads: int) -> dict[str, Any]:
    """The head of a report: what was typed, when, on which sources and machine."""
    return {
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": describe(threads),
    }


def load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def cpus_used_by_others(seconds: float = 0.25) -> float:
    """How many CPUs work for other processes; one is enough to spoil the figures."""
    start, idle, before = time.perf_counter(), _idle_ticks(), time.process_time()
    time.sleep(seconds)
    own = time.process_time() - before
    idle_s = (_idle_ticks() - idle) / os.sysconf("SC_CLK_TCK")
    elapsed = time.perf_counter() - start
    return round(max(0.0, (os.cpu_count() or 1) - (idle_s + own) / elapsed), 2)


def _idle_ticks() -> int:
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(fields[4]) + int(fields[5])  # idle, and waiting for a disk


def sources(root: Path) -> str:
    """A digest of what decides the compiled code: the benchmark itself may change between two runs."""
    digest = hashlib.sha256()
    for path in sorted((root / PACKAGE).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_field(name: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
