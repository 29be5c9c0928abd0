"""What the tests of one run share: imports, compiled models and other files that cost seconds, each made once.

They lie on disk, so that all workers of a run have them, whichever made them first. A test of the import or the compile
itself still imports and compiles.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tvm
from filelock import FileLock

import turbo_tvm
from turbo_tvm.artifact import file as artifact_file
from turbo_tvm.compiler import compile as compiler
from turbo_tvm.errors import ArtifactError
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.importer import import_model
from turbo_tvm.frontends.options import DEFAULTS, ImportOptions
from turbo_tvm.runtime.executor import ForeignExecutor

Build = Callable[[], Any]  # makes the model that a name stands for: the same one in every worker


class Shared:
    """Things that are made once per run, by name. A name stands for one thing in the whole run."""

    def __init__(self, folder: Path):
        """folder: common to all workers of the run, and to no other run."""
        self._folder = folder
        self._models: dict[str, turbo_tvm.CompiledModel] = {}  # of this worker, by name
        self._imports: dict[str, Imported] = {}  # of this worker, by name

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of that name, which `make` fills unless a worker has done so before.

        A worker that asks while another makes it waits. Raises whatever `make` raises, for every worker that asks.
        """
        place = self._folder / hashlib.sha256(name.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.exists():
                unfinished = place.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(place)
        return place

    def imported(self, name: str, build: Build, options: ImportOptions = DEFAULTS) -> Imported:
        """Return the import of a model."""
        name = f"{name}, {options}"
        if name not in self._imports:
            place = self.made(f"import of {name}", lambda folder: write_import(import_model(build(), options), folder))
            self._imports[name] = read_import(place)
        return self._imports[name]

    def artifact(self, name: str, build: Build, options: ImportOptions = DEFAULTS, **how: Any) -> Path:
        """Return the path of a compiled model; `how` are further arguments of `turbo_tvm.compile`, such as precision.

        Its import is the shared one: a second precision or target of a model is not imported again.
        """

        def make(folder: Path) -> None:
            imported = self.imported(name, build, options)
            with mock.patch.object(compiler, "import_model", lambda *_: imported):
                turbo_tvm.compile(imported.name, progress=False, **how).save(folder / "model.turbo")

        return self.made(f"{name}, {options} compiled {sorted(how.items())}", make) / "model.turbo"

    def compiled(self, name: str, build: Build, options: ImportOptions = DEFAULTS, **how: Any) -> Any:
        """Return a compiled model, as `turbo_tvm.compile` does; the same object for a worker's every call.

        A test that changes the model puts it back, or loads `artifact` for one of its own.
        """
        path = self.artifact(name, build, options, **how)
        if str(path) not in self._models:
            self._models[str(path)] = opened(path)
        return self._models[str(path)]


def opened(path: Path) -> turbo_tvm.CompiledModel:
    """Load a compiled model; one for another machine can be saved, not run, as `turbo_tvm.compile` returns it."""
    try:
        return turbo_tvm.load(path)
    except ArtifactError as foreign:
        return turbo_tvm.CompiledModel(artifact_file.read(path), ForeignExecutor(str(foreign)))


def write_import(imported: Imported, folder: Path) -> None:
    """Write an import: the module as TVM's JSON, weights as NumPy's arrays, the rest as Python's records."""
    (folder / "module.json").write_text(tvm.ir.save_json(imported.mod))
    np.savez(folder / "weights.npz", *[weight.numpy() for weight in imported.weights])
    (folder / "record.pickle").write_bytes(pickle.dumps(replace(imported, mod=None, weights=[])))


def read_import(folder: Path) -> Imported:
    """Read what `write_import` wrote."""
    with np.load(folder / "weights.npz") as arrays:
        weights = [tvm.runtime.tensor(arrays[name]) for name in arrays.files]
    record = pickle.loads((folder / "record.pickle").read_bytes())
    return replace(record, mod=tvm.ir.load_json((folder / "module.json").read_text()), weights=weights)
