"""Settings that come from outside: the only place that reads the environment, and what the host offers.

TURBO_TVM_CUDA_GRAPHS       0 to launch a GPU's kernels one by one even for shapes that repeat
TURBO_TVM_DUMP_IR           a directory; the compiler writes the module after every pass there, as text
TURBO_TVM_KERNEL_CACHE      0 to compile every kernel anew, or a directory to keep compiled kernels in; the default is
                            turbo_tvm/kernels in XDG_CACHE_HOME. It holds native code: a directory that someone else
                            owns, or that others may write to, is not used
TURBO_TVM_KERNEL_CACHE_MB   how large that directory may become, in megabytes (2**20 bytes); the default is 512. What
                            was not used for the longest time leaves first
TURBO_TVM_NVCC              NVIDIA's compiler, for CUDA targets; the default is that of CUDA_HOME or CUDA_PATH, else of
                            PATH
TURBO_TVM_NUM_THREADS       threads per model when the caller names none; the default is one per physical core
TURBO_TVM_TIME_PASSES       1 to print how long each pass of the compiler took
XDG_CACHE_HOME              where compiled kernels and the machine's measured limits are kept; the default is ~/.cache
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turbo_tvm.errors import CompileError, TurboError


def dump_ir_directory() -> Path | None:
    """Where to write the module after every pass, or None."""
    value = os.environ.get("TURBO_TVM_DUMP_IR")
    return Path(value) if value else None


def times_passes() -> bool:
    """Whether to print how long each pass took."""
    return os.environ.get("TURBO_TVM_TIME_PASSES") == "1"


def cache_directory() -> Path | None:
    """Where to keep what can be measured again, or None where the user has no home. It need not exist."""
    value = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if value.is_absolute():  # the XDG specification ignores any other
        return value / "turbo_tvm"
    try:
        return Path.home() / ".cache" / "turbo_tvm"
    except RuntimeError:
        return None


def kernel_cache_directory() -> Path | None:
    """Where to keep compiled kernels, or None to keep none. It need not exist."""
    value = os.environ.get("TURBO_TVM_KERNEL_CACHE", "1")
    if value == "0":
        return None
    if value not in ("", "1"):
        return Path(value)
    home = cache_directory()
    return None if home is None else home / "kernels"


def kernel_cache_bytes() -> int:
    """How large the cache of compiled kernels may become. Raises TurboError for a setting that is no number."""
    value = os.environ.get("TURBO_TVM_KERNEL_CACHE_MB") or "512"
    if not (value.isascii() and value.isdigit()):
        raise TurboError(f"TURBO_TVM_KERNEL_CACHE_MB must be a whole number of megabytes, not {value!r}")
    return int(value) << 20


def cuda_graphs() -> bool:
    """Whether to replay batches of a shape that repeats as one CUDA graph."""
    return os.environ.get("TURBO_TVM_CUDA_GRAPHS") != "0"


def nvcc() -> str | None:
    """Where the CUDA toolkit's compiler is, if it is anywhere. Raises CompileError if the one that is named is not."""
    named = os.environ.get("TURBO_TVM_NVCC")
    if named:
        found = shutil.which(named)
        if found is None:
            raise CompileError(f"there is no program {named!r}, which TURBO_TVM_NVCC names")
        return found
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for place in (*(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(place)
        if found is not None:
            return found
    return None


def nvdisasm() -> str | None:
    """Where NVIDIA's disassembler is: on PATH, or from its Python package; None without one."""
    found = shutil.which("nvdisasm")
    if found is None and importlib.util.find_spec("nvidia") is not None:
        for root in importlib.import_module("nvidia").__path__:
            found = next((str(path) for path in sorted(Path(root).glob("cu*/bin/nvdisasm"))), found)
    return found


@contextmanager
def tvm_keeps_cuda_source() -> Iterator[None]:
    """While open, TVM keeps the CUDA source in what it builds, even if it has a GPU to make machine code for."""
    before = os.environ.get("TVM_COMPILE_FORCE_FALLBACK")
    os.environ["TVM_COMPILE_FORCE_FALLBACK"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TVM_COMPILE_FORCE_FALLBACK")
        if before is not None:
            os.environ["TVM_COMPILE_FORCE_FALLBACK"] = before


def let_tvm_use_every_core() -> None:
    """Lift TVM's own limits, which are fixed when a thread first runs a kernel: call this before.

    By itself TVM starts half as many threads as there are logical CPUs, and pins them, two models to the same cores.
    How many of them a model uses is set per calling thread by the executor. What the user has set stays.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def num_threads(asked: int | None = None) -> int:
    """Threads to run a model on: what was asked, else TURBO_TVM_NUM_THREADS, else the physical cores we may use."""
    value = asked if asked is not None else os.environ.get("TURBO_TVM_NUM_THREADS")
    if value is None:
        return physical_cores()
    try:
        count = int(str(value))  # through text: 1.5 is not a number of threads
    except ValueError:
        count = 0
    limit = int(os.environ.get("TVM_NUM_THREADS", os.cpu_count() or 1))
    if not 1 <= count <= limit:
        raise TurboError(f"the number of threads must be a whole number from 1 to {limit}, not {value!r}")
    return count


def physical_cores() -> int:
    """Physical cores among the CPUs this process may run on; hyper-threads gain nothing on matrix kernels."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in cpus}
    return max(1, len(cores))


def _core_of(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def import_tvm_to_run() -> None:
    """Import TVM for a process that runs artifacts: without its compiler, and without PyTorch.

    By itself `import tvm` loads both, and PyTorch alone takes seconds and hundreds of megabytes. If either is in this
    process already, nothing changes: it will want to compile. PyTorch can be imported afterwards; `compile` then says
    that the process has no compiler.
    """
    if "tvm" in sys.modules or "torch" in sys.modules:
        return
    before = os.environ.get("TVM_USE_RUNTIME_LIB")
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("tvm")
    finally:
        del sys.modules["torch"]
        os.environ.pop("TVM_USE_RUNTIME_LIB")
        if before is not None:
            os.environ["TVM_USE_RUNTIME_LIB"] = before


_SERVER = "TURBO_TVM_SERVER"
_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's


def server_settings() -> str:
    """The settings that a server's supervisor left for its workers, as JSON."""
    return os.environ[_SERVER]


def tell_workers(settings: str, metrics: str) -> None:
    """For the processes that start from now on: a server's settings, and the folder where they count together."""
    os.environ[_SERVER], os.environ[_METRICS] = settings, metrics


def counts_with_others() -> Path | None:
    """The directory of the metrics, if this process is one of several workers of a server, that count together."""
    folder = os.environ.get(_METRICS)
    return Path(folder) if folder is not None else None


def tokenize_in_one_thread() -> None:
    """Keep tokenizers from starting a thread per core, beside those of the kernels."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def traced_service() -> str | None:
    """The service's name for OpenTelemetry, by its own variables; None where no exporter is named."""
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return os.environ.get("OTEL_SERVICE_NAME", "turbo_tvm") if any(map(os.environ.get, named)) else None


def check_tvm_can_compile() -> None:
    """Raises CompileError if TVM was imported without its compiler in this process."""
    base = sys.modules.get("tvm.base")
    if getattr(base, "_RUNTIME_ONLY", False):
        raise CompileError(
            "this process loaded a model first, and with it TVM without its compiler: import torch before "
            "turbo_tvm.load, or compile in another process"
        )


def quiet_model_loading() -> None:
    """For a process with progress of its own, before transformers is imported: no progress bars from there."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
