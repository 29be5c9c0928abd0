"""Compile: from a model to a `CompiledModel`, through frontend, pipeline and artifact."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import tvm
from tvm import ir, relax

import turbo_tvm
from turbo_tvm import config
from turbo_tvm.artifact.file import Artifact
from turbo_tvm.artifact.manifest import (
    LABELLED,
    BufferSpec,
    KernelSpec,
    Manifest,
    OutputSpec,
    ParameterSpec,
    PooledToken,
    TensorSpec,
)
from turbo_tvm.compiler import pipeline, targets
from turbo_tvm.compiler.cuda import machine_code
from turbo_tvm.compiler.kernels import Tuned
from turbo_tvm.compiler.tuned_kernels import SHIPPED, Applied, applied
from turbo_tvm.errors import ArtifactError, CompileError, TargetError, TurboError, UnsupportedModelError, summary
from turbo_tvm.frontends.imported import TOLERANCES, Imported
from turbo_tvm.frontends.onnx import folder as onnx_folder
from turbo_tvm.passes.fuse_pooling import LARGEST
from turbo_tvm.passes.rewriter import dims_of
from turbo_tvm.progress import Progress
from turbo_tvm.runtime.device import gpu
from turbo_tvm.runtime.device.cpu_features import check_host
from turbo_tvm.runtime.executor import ForeignExecutor
from turbo_tvm.runtime.loader import open_model
from turbo_tvm.runtime.model import CompiledModel
from turbo_tvm.runtime.text import TextTokenizer
from turbo_tvm.schedules.cpu.tiles import cpu_tiles
from turbo_tvm.schedules.cuda.tiles import CUDA_TILES

PRECISIONS = ("fp32", "bf16", "fp16")
_KINDS = {"input_ids": "token_ids"}  # other inputs are named after their kind
_MAIN_OUTPUTS = (
    "sentence_embedding",
    "text_embeds",
    "image_embeds",
    "logits",
    "last_hidden_state",
    "output",
    "output_0",
)


def compile(
    model: Any,
    *,
    target: str = "cpu",
    precision: str = "fp32",
    name: str | None = None,
    max_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    tokenizer: str | PathLike[str] | None = None,
    threads: int | None = None,
    logs: str | PathLike[str] | bool = True,
    progress: bool | None = None,
) -> CompiledModel:
    """Compile a transformer encoder for requests of any batch size and length.

    model: a `torch.nn.Module` (a Hugging Face encoder with or without head, or any module whose forward takes
        input_ids and attention_mask, or pixel_values), or the path of a model folder with config.json and
        model.safetensors (or model.onnx), or of an ONNX file.
    target: "cpu" for this machine, or "cpu:<name>" for another CPU, such as "cpu:x86-64-v3"; "cuda:sm_80" for an NVIDIA
        GPU, "cuda:sm_80,sm_90" for several. Needs nvcc or the packages of turbo-tvm[cuda12], and no GPU.
    precision: "fp32"; or "bf16": weights, products and the rows between kernels in bf16, sums, norms and softmax in
        fp32, outputs in fp32, on a CPU with AVX512-BF16 or a GPU from sm_80 on; or "fp16", the same on any GPU.
    name: what the artifact is called; by default the folder's or class's name.
    max_length: the longest sequence in tokens; by default what the model allows.
    image_size: (height, width) of all images, or one number for both; by default the configuration's. For another one
        the model's positions are interpolated, if it can.
    tokenizer: the path of a `tokenizer.json` for `encode`; a model folder brings its own.
    threads: threads per call; by default one per physical core.
    logs: a directory of tuning logs (`turbo_tvm.tune`) whose settings the kernels get, where they fit the target; True
        for those that come with turbo_tvm, False for none. The manifest names the kernels that were tuned.
    progress: whether to show progress on stderr; by default if it is a terminal.

    Returns a CompiledModel; one for a CPU or GPU that this machine lacks can be saved, not run. Raises
    UnsupportedModelError, TargetError, CompileError or, for a damaged log, TuningLogError, all of them TurboError.
    """
    if precision not in PRECISIONS:
        raise TargetError(f"precision {precision!r} is not supported; use one of {', '.join(PRECISIONS)}")
    count = config.num_threads(threads)
    machine = targets.resolve(target)
    targets.check_precision(machine, precision)
    _check_compiler()
    architectures = targets.architectures(target)
    if architectures:
        machine_code.choose_compilers(architectures)
    with Progress("compile", progress) as show:
        show("importing the model")
        imported = _import(model, name, max_length, tokenizer, image_size)
        show("optimising the graph")
        tiles = CUDA_TILES if architectures else cpu_tiles(machine)
        optimized = pipeline.optimize(imported.mod, tiles, imported.bounds.max_length, precision)
        tuning = applied(optimized.kernels, target, _logs(logs)) if logs else Applied()
        show(f"generating code and packing weights{_tuned_words(tuning)}")
        built = _build(optimized, imported, machine, tiles, tuning.variants)
        code = machine_code.DeviceCode()
        if architectures:
            show(f"machine code for {', '.join(architectures)}")
            code = machine_code.compile_source(built.device_source, architectures, built.device_counts)
        show("linking")
        manifest = _manifest(imported, optimized, built, targets.describe(target, machine), precision, tiles, tuning)
        manifest = replace(manifest, device_kernels=code.kernels, device_source=code.source)
        library = _link(built.executable)
        path = Path(f"{imported.name}.turbo")
        artifact = Artifact(manifest, library, built.parameters, imported.tokenizer, path, code.cubins)
        model = _open(artifact, count)
        show("comparing with the original")
        _check_answers(model, imported)
        return model


def kernels_of(model: Any, target: str, precision: str) -> tuple[tuple[KernelSpec, ...], int]:
    """The kernels that a model is compiled to, without compiling them, and its longest sequence in tokens."""
    machine = targets.resolve(target)
    targets.check_precision(machine, precision)
    imported = _import(model, None, None, None, None)
    tiles = CUDA_TILES if targets.architectures(target) else cpu_tiles(machine)
    optimized = pipeline.optimize(imported.mod, tiles, imported.bounds.max_length, precision)
    return optimized.kernels, imported.bounds.max_length


def _logs(logs: str | PathLike[str] | bool) -> Path:
    """The directory of the logs. CompileError for one that does not exist."""
    path = SHIPPED if isinstance(logs, bool) else Path(logs)
    if not isinstance(logs, bool) and not path.is_dir():
        raise CompileError(f"there is no directory of tuning logs at {path}")
    return path


def _tuned_words(tuning: Applied) -> str:
    return f", {len(tuning.variants)} kernels as tuned" if tuning.variants else ""


def _check_answers(compiled: CompiledModel, imported: Imported) -> None:
    """UnsupportedModelError if the model answers otherwise than the original: no such model leaves here."""
    if imported.sample is None or not compiled.threads:  # it was compiled for another machine
        return
    answers = compiled(**imported.sample.inputs)
    for name, difference in imported.sample.differences(answers).items():
        if not difference <= TOLERANCES[compiled.manifest.precision]:  # NaN too
            raise UnsupportedModelError(
                f"{imported.name} is not supported: compiled, its output {name!r} differs from the original's by "
                f"{difference:.2g} of its largest value"
            )


def _open(artifact: Artifact, threads: int) -> CompiledModel:
    """The model, ready to run if it was compiled for a machine like this one, and to save in any case."""
    try:
        check_host(artifact.manifest.target)
        if artifact.cubins:
            gpu.choose(artifact.cubins)
    except ArtifactError as foreign:
        return CompiledModel(artifact, ForeignExecutor(str(foreign)))
    return open_model(artifact, threads)


def _import(
    model: Any,
    name: str | None,
    max_length: int | None,
    tokenizer: str | PathLike[str] | None,
    image_size: int | tuple[int, int] | None,
) -> Imported:
    text = _read_tokenizer(tokenizer)
    if isinstance(model, str | PathLike):
        return _import_path(Path(model), name, max_length, text, image_size)
    _need_torch()
    from turbo_tvm.frontends.torch.module import import_module

    return import_module(model, name, max_length, text, image_size)


def _import_path(
    path: Path,
    name: str | None,
    max_length: int | None,
    tokenizer: str | None,
    image_size: int | tuple[int, int] | None,
) -> Imported:
    if not path.exists():
        raise UnsupportedModelError(f"there is no model at {path}")
    exported = path if path.suffix == ".onnx" else onnx_folder.file_in(path)
    if exported is not None:
        return _import_onnx(exported, name, max_length, tokenizer, image_size)
    if not path.is_dir():
        raise UnsupportedModelError(
            f"{path} is a file; an ONNX file (.onnx) or a model folder with config.json and model.safetensors is needed"
        )
    _need_torch()
    from turbo_tvm.frontends.torch.folder import load_folder
    from turbo_tvm.frontends.torch.module import import_module

    module, own_tokenizer, own_length = load_folder(path)
    return import_module(
        module, name or path.resolve().name, max_length or own_length, tokenizer or own_tokenizer, image_size
    )


def _import_onnx(
    path: Path,
    name: str | None,
    max_length: int | None,
    tokenizer: str | None,
    image_size: int | tuple[int, int] | None,
) -> Imported:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise CompileError(f"compiling ONNX files needs onnx ({error}): pip install 'turbo-tvm[onnx]'") from error
    from turbo_tvm.frontends.onnx.model import import_file

    return import_file(path, name, max_length, tokenizer, image_size)


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise CompileError(
            f"compiling needs PyTorch and transformers ({error}): pip install 'turbo-tvm[torch]'"
        ) from error


def _read_tokenizer(path: str | PathLike[str] | None) -> str | None:
    if path is None:
        return None
    try:
        text = Path(path).read_text()
        TextTokenizer(text, max_length=1)  # refuse here what `encode` would refuse later
        return text
    except (OSError, ValueError, ArtifactError) as error:
        reason = getattr(error, "strerror", None) or summary(error)
        raise UnsupportedModelError(f"the tokenizer {path} cannot be used: {reason}") from error


def _check_compiler() -> None:
    from tvm.support import cc

    found = cc.get_cc()
    if not found or shutil.which(found) is None:
        raise CompileError("no C++ compiler was found to link the code: install g++ or clang, or name one in CXX")


def _build(
    optimized: pipeline.Optimized, imported: Imported, machine: Any, tiles: pipeline.Tiles, tuned: Tuned
) -> pipeline.Built:
    try:
        return pipeline.build(optimized, imported.weights, machine, targets.resolve("cpu"), tiles, tuned=tuned)
    except TurboError:
        raise
    except Exception as error:  # whatever TVM's lowering raises for a graph that it cannot compile
        raise CompileError(f"TVM cannot compile {imported.name}: {summary(error)}") from error


def _link(executable: relax.VMExecutable) -> bytes:
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_") as directory:
        path = Path(directory) / "library.so"
        try:
            executable.export_library(str(path))
            return path.read_bytes()
        except (OSError, RuntimeError) as error:
            raise CompileError(f"linking the code failed: {summary(error)}") from error


def _manifest(
    imported: Imported,
    optimized: pipeline.Optimized,
    built: pipeline.Built,
    target: Any,
    precision: str,
    tiles: pipeline.Tiles,
    tuning: Applied,
) -> Manifest:
    func = optimized.mod["main"]
    inputs = [(p.name, str(p.ty.dtype)) for p in func.params[: int(func.attrs["num_input"])]]
    outputs = tuple(
        _output(name, ty, tiles, optimized) for name, ty in zip(imported.output_names, built.outputs, strict=True)
    )
    return Manifest(
        turbo_version=turbo_tvm.__version__,
        tvm_version=tvm.__version__,
        name=imported.name,
        model_type=imported.model_type,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        layout=optimized.layout,  # type: ignore[arg-type]
        row_tile=tiles.row_tile,
        query_tile=tiles.query_tile,
        inputs=tuple(TensorSpec(n, dtype, _KINDS.get(n, n)) for n, dtype in inputs),  # type: ignore[arg-type]
        outputs=outputs,
        primary=_primary(imported.output_names),
        labels=_labels(imported, outputs),
        bounds=imported.bounds,
        positions=imported.positions,
        relative_positions=optimized.relative_positions,
        pools_first=optimized.pools_first,
        pooled=_pooled(optimized.pooled_token),
        buffers=tuple(BufferSpec(**vars(b)) for b in built.memory.buffers),
        steps=built.memory.steps,
        parameters=tuple(ParameterSpec(n, tuple(a.shape), str(a.dtype)) for n, a in built.parameters.items()),  # type: ignore[arg-type]
        kernels=optimized.kernels_in(tuning.variants),
        tuning=tuple(f"{kernel}: {why}" for kernel, why in tuning.refused.items()),
        declined=optimized.declined,
        source_parameters=imported.parameter_count,
    )


def _labels(imported: Imported, outputs: tuple[OutputSpec, ...]) -> tuple[str, ...]:
    """The labels of the logits: every configuration of transformers names two, also of models without a classifier."""
    columns = next((output.columns for output in outputs if output.name == LABELLED), 0)
    return imported.labels if len(imported.labels) == columns else ()


def _pooled(token: int | None) -> PooledToken:
    if token is None:
        return PooledToken()
    return PooledToken("largest") if token == LARGEST else PooledToken("first_of", token)


def _output(name: str, ty: ir.Type, tiles: pipeline.Tiles, optimized: pipeline.Optimized) -> OutputSpec:
    """How to read one output, from its type: rows per token or per sequence, and how many columns."""
    dims = dims_of(ty)
    if optimized.layout == "packed":
        per_token = dims[0].same_as(dims_of(optimized.mod["main"].params[0].ty)[0])
        return OutputSpec(name, "token" if per_token else "sequence", dims[2] if len(dims) > 2 else 1, len(dims) == 2)
    length = dims_of(optimized.mod["main"].params[0].ty)[1]  # of images it is a number
    per_token = len(dims) > 1 and (
        not isinstance(dims[1], int) or (isinstance(length, int) and len(dims) == 3 and dims[1] == length)
    )
    columns = dims[1 + per_token :]
    if len(columns) > 1:
        raise UnsupportedModelError(f"output {name!r} has rank {len(dims)}; at most a vector per token is supported")
    return OutputSpec(name, "token" if per_token else "sequence", columns[0] if columns else 1, not columns)


def _primary(names: tuple[str, ...]) -> str | None:
    return next((n for n in _MAIN_OUTPUTS if n in names), names[0] if len(names) == 1 else None)
