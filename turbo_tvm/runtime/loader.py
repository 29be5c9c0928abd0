"""Loading: from an artifact to a `CompiledModel`, without torch and without a compiler."""

from __future__ import annotations

from os import PathLike

from turbo_tvm import config
from turbo_tvm.artifact import file as artifact
from turbo_tvm.artifact.file import Artifact
from turbo_tvm.errors import ArtifactError
from turbo_tvm.runtime.device.cpu_features import check_host, request_amx
from turbo_tvm.runtime.model import CompiledModel


def load(path: str | PathLike[str], *, threads: int | None = None) -> CompiledModel:
    """Load an artifact that `CompiledModel.save` wrote.

    threads: threads per call; by default one per physical core.

    Every byte is verified before any native code is loaded. That finds damage, not malice: an artifact holds machine
    code, so load only files you trust, as with any program. Raises ArtifactError for a file that cannot be read or is
    damaged, and for one that this machine cannot run.
    """
    count = config.num_threads(threads)
    return open_model(artifact.read(path), count)


def open_model(opened: Artifact, threads: int) -> CompiledModel:
    """Check that this CPU or GPU, system and TVM can run a verified artifact, and load its code."""
    check_host(opened.manifest.target)
    import tvm

    if tvm.__version__ != opened.manifest.tvm_version:
        raise ArtifactError(
            f"{opened.path} was compiled with TVM {opened.manifest.tvm_version}, this is TVM {tvm.__version__}: "
            "install that version or compile the model again"
        )
    if opened.manifest.precision == "bf16" and opened.manifest.target.device == "cpu":
        request_amx(opened.manifest.target)  # no code in fp32 uses it
    from turbo_tvm.runtime.device import gpu
    from turbo_tvm.runtime.device.library import load_library
    from turbo_tvm.runtime.executor import Executor

    if opened.cubins:
        gpu.provide(opened.manifest.device_source, opened.cubins[gpu.choose(opened.cubins)])
    module = load_library(opened.library)
    return CompiledModel(opened, Executor(module, opened.manifest, opened.weights, threads))
