"""Import a model, whatever format it comes in: the way into the frontends.

A format is a line in `_FORMATS`: whether a model is of that format, and what imports it. Importers are loaded when they
are used, so that an ONNX file needs no PyTorch and a module no onnx.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from turbo_tvm.errors import CompileError, UnsupportedModelError
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.onnx.folder import file_in
from turbo_tvm.frontends.options import DEFAULTS, ImportOptions


def import_model(model: Any, options: ImportOptions = DEFAULTS) -> Imported:
    """Import an encoder.

    model: a `torch.nn.Module`, or the path of a model folder or of an ONNX file.

    Raises UnsupportedModelError for what is no such model or is not supported, CompileError if the packages that read
    this format are not installed.
    """
    if isinstance(model, str | PathLike):
        model = Path(model)
        if not model.exists():
            raise UnsupportedModelError(f"there is no model at {model}")
    import_it = next(import_it for is_of, import_it in _FORMATS if is_of(model))
    return import_it(model, options)


def onnx_file(model: Path) -> Path | None:
    """Return the ONNX file that a path stands for: itself, or the one in its folder; None for another format."""
    return model if model.suffix == ".onnx" else file_in(model)


def _is_onnx(model: Any) -> bool:
    return isinstance(model, Path) and onnx_file(model) is not None


def _is_folder(model: Any) -> bool:
    return isinstance(model, Path) and model.is_dir()


def _is_file(model: Any) -> bool:
    return isinstance(model, Path)


def _is_object(model: Any) -> bool:
    return True


def _import_onnx(model: Path, options: ImportOptions) -> Imported:
    _need("ONNX files ", "onnx", "onnx")
    from turbo_tvm.frontends.onnx.model import import_file

    return import_file(onnx_file(model) or model, options)


def _import_folder(model: Path, options: ImportOptions) -> Imported:
    _need_torch()
    from turbo_tvm.frontends.torch.folder import import_folder

    return import_folder(model, options)


def _refuse_file(model: Path, options: ImportOptions) -> Imported:
    raise UnsupportedModelError(
        f"{model} is a file; an ONNX file (.onnx) or a model folder with config.json and model.safetensors is needed"
    )


def _import_module(model: Any, options: ImportOptions) -> Imported:
    _need_torch()
    from turbo_tvm.frontends.torch.module import import_module

    return import_module(model, options)


# Whether a model is of the format, and what imports it; the first that fits is taken.
_FORMATS: tuple[tuple[Callable[[Any], bool], Callable[[Any, ImportOptions], Imported]], ...] = (
    (_is_onnx, _import_onnx),
    (_is_folder, _import_folder),
    (_is_file, _refuse_file),
    (_is_object, _import_module),
)


def _need_torch() -> None:
    _need("", "torch", "torch", "transformers")


def _need(what: str, extra: str, *packages: str) -> None:
    """Raise CompileError if a package that reads such models is missing."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        names = " and ".join({"torch": "PyTorch"}.get(package, package) for package in packages)
        raise CompileError(f"compiling {what}needs {names} ({error}): pip install 'turbo-tvm[{extra}]'") from error
