"""Compile: from a model to a `CompiledModel`, through frontend, pipeline and artifact."""

from __future__ import annotations

from os import PathLike
from typing import Any

from turbo_tvm import config
from turbo_tvm.artifact.file import Artifact
from turbo_tvm.artifact.manifest import KernelSpec
from turbo_tvm.compiler import linking, lowering, pipeline, targets, tuned_kernels
from turbo_tvm.compiler.cuda import machine_code
from turbo_tvm.compiler.describe import manifest_of
from turbo_tvm.compiler.observation import observed
from turbo_tvm.compiler.pipeline import Optimized
from turbo_tvm.compiler.targets import CompileTarget
from turbo_tvm.compiler.tuned_kernels import Applied
from turbo_tvm.errors import ArtifactError, CompileError, TurboError, UnsupportedModelError, summary
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.frontends.importer import import_model
from turbo_tvm.frontends.options import ImportOptions, read_tokenizer
from turbo_tvm.frontends.sample import TOLERANCES
from turbo_tvm.progress import Progress
from turbo_tvm.runtime.device import gpu
from turbo_tvm.runtime.device.cpu_features import check_host
from turbo_tvm.runtime.executor import ForeignExecutor
from turbo_tvm.runtime.loader import open_model
from turbo_tvm.runtime.model import CompiledModel


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
    wanted = targets.compile_target(target, precision)
    count = config.num_threads(threads)
    linking.check_linker()
    machine_code.check_compilers(wanted.architectures)
    options = ImportOptions(name, max_length, read_tokenizer(tokenizer), image_size=image_size)
    with Progress("compile", progress) as show:
        show("importing the model")
        with observed("import"):
            imported = import_model(model, options)
        show("optimising the graph")
        optimized = pipeline.optimize(imported.mod, wanted.tiles, imported.request_limits.max_length, precision)
        tuned = tuned_kernels.chosen(optimized.kernels, target, logs)
        show(f"generating code and packing weights{_tuned_words(tuned)}")
        built = _build(optimized, imported, wanted, tuned)
        show(f"machine code for {', '.join(wanted.architectures)}" if wanted.architectures else "linking")
        code = machine_code.compile_source(built.device_source, wanted.architectures, built.device_counts)
        artifact = linking.link(imported, built, code, manifest_of(imported, optimized, built, wanted, tuned))
        compiled = _open(artifact, count)
        show(f"comparing with the original{_cached_words(built)}")
        _check_answers(compiled, imported)
        return compiled


def kernels_of(model: Any, target: str, precision: str) -> tuple[tuple[KernelSpec, ...], int]:
    """Return the kernels that a model is compiled to, without compiling them, and its longest sequence in tokens."""
    wanted, imported = targets.compile_target(target, precision), import_model(model)
    longest = imported.request_limits.max_length
    return pipeline.optimize(imported.mod, wanted.tiles, longest, precision).kernels, longest


def _tuned_words(tuned: Applied) -> str:
    return f", {len(tuned.variants)} kernels as tuned" if tuned.variants else ""


def _cached_words(built: lowering.Built) -> str:
    kernels = built.compiled_kernels + built.cached_kernels
    return f"; {built.cached_kernels} of {kernels} kernels were in the cache" if built.cached_kernels else ""


def _check_answers(compiled: CompiledModel, imported: Imported) -> None:
    """UnsupportedModelError if the model answers otherwise than the original: no such model leaves here."""
    if not compiled.threads:  # it was compiled for another machine
        return
    for sample in imported.samples:
        for name, difference in sample.differences(compiled(**sample.inputs)).items():
            if not difference <= TOLERANCES[compiled.manifest.precision]:  # NaN too
                raise UnsupportedModelError(
                    f"{imported.name} is not supported: compiled, its output {name!r} differs from the original's by "
                    f"{difference:.2g} of its largest value, for {sample.size}"
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


def _build(optimized: Optimized, imported: Imported, wanted: CompileTarget, tuned: Applied) -> lowering.Built:
    """Return code and weights. Raises CompileError for whatever TVM's lowering raises."""
    try:
        return lowering.build(optimized, imported.weights, wanted.machine, tuned=tuned.variants)
    except TurboError:
        raise
    except Exception as error:
        raise CompileError(f"TVM cannot compile {imported.name}: {summary(error)}") from error
