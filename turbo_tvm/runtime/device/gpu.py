"""Machine code for this machine's NVIDIA GPU: choosing it in an artifact, and giving it to TVM's loader.

TVM keeps the CUDA source in a library and asks the function `tvm_callback_cuda_compile` for machine code when it loads
one. Here that function looks up the artifact's machine code by the source's sum: no compiler runs where a model is
served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from turbo_tvm.errors import ArtifactError

_COMPILE = "tvm_callback_cuda_compile"
_known: dict[str, bytes] = {}  # machine code by the sum of its source


def choose(architectures: Iterable[str]) -> str:
    """Return the architecture whose code this machine's first GPU runs: its own, or an older one of its generation.

    Raises ArtifactError if there is no GPU, or none of the architectures fits it.
    """
    names = sorted(architectures, key=lambda name: int(name[3:]))
    missing = _load_runtime()
    import tvm

    device = tvm.cuda(0)
    if not device.exist:
        raise ArtifactError(
            f"this model was compiled for NVIDIA GPUs ({', '.join(names)}), and this machine has none that can be used"
            f"{missing}: load it where one is, or compile the model for this CPU"
        )
    major, minor = (int(part) for part in str(device.compute_version).split("."))
    fitting = [name for name in names if int(name[3:]) // 10 == major and int(name[3:]) % 10 <= minor]
    if not fitting:
        raise ArtifactError(
            f"this machine's GPU is an sm_{major}{minor}, and the artifact holds code for {', '.join(names)}: compile "
            f"the model with target='cuda:sm_{major}{minor}'"
        )
    return fitting[-1]


def _load_runtime() -> str:
    """Load TVM's CUDA runtime, which a process that only runs models lacks. Return why it cannot be loaded, or ""."""
    import tvm_ffi
    from tvm_ffi.libinfo import load_lib_ctypes

    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return ""
    import tvm

    folder = Path(tvm.__file__).parent / "lib"
    try:
        load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", extra_lib_paths=[folder])
    except (OSError, RuntimeError) as error:  # mostly that there is no driver: libcuda.so.1
        return f" ({error})"
    return ""


def provide(source_sum: str, code: bytes) -> None:
    """Let TVM find this machine code when it loads the source with this sha256 in hexadecimal digits."""
    import tvm_ffi

    _known[source_sum] = code
    before = tvm_ffi.get_global_func(_COMPILE, allow_missing=True)
    if getattr(provide, "installed", False):
        return

    def compiled(source: str) -> Any:
        found = _known.get(hashlib.sha256(source.encode()).hexdigest())
        if found is not None:
            return found
        if before is None:
            raise ArtifactError("the artifact's library holds GPU code that its manifest does not vouch for")
        return before(source)

    tvm_ffi.register_global_func(_COMPILE, compiled, override=True)
    provide.installed = True  # type: ignore[attr-defined]
