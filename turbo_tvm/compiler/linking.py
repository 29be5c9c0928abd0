"""Link: from a compiled module and its weights to an artifact."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from tvm import relax
from tvm.support import cc

from turbo_tvm.artifact.file import Artifact
from turbo_tvm.artifact.manifest import Manifest
from turbo_tvm.compiler.cuda.machine_code import DeviceCode
from turbo_tvm.compiler.lowering import Built, write_library
from turbo_tvm.errors import CompileError
from turbo_tvm.frontends.imported import Imported


def check_linker() -> None:
    """Raise CompileError unless this machine has a C++ compiler, which links."""
    found = cc.get_cc()
    if not found or shutil.which(found) is None:
        raise CompileError("no C++ compiler was found to link the code: install g++ or clang, or name one in CXX")


def link(imported: Imported, built: Built, code: DeviceCode, manifest: Manifest) -> Artifact:
    """Return the artifact of a model. Raises CompileError if its code cannot be linked.

    manifest: what it says of itself, but for its GPU code.
    """
    manifest = replace(manifest, device_kernels=code.kernels, device_source=code.source)
    library, path = _library(built.executable), Path(f"{imported.name}.turbo")
    return Artifact(manifest, library, built.parameters, imported.tokenizer, path, code.cubins)


def _library(executable: relax.VMExecutable) -> bytes:
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:
        path = Path(directory) / "library.so"
        write_library(executable, path)
        return path.read_bytes()
