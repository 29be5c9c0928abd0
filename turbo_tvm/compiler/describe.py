"""What an artifact says of itself: the manifest of a compiled model."""

from __future__ import annotations

import tvm
from tvm import ir

import turbo_tvm
from turbo_tvm.artifact.manifest import (
    LABELLED,
    BufferSpec,
    Manifest,
    OutputSpec,
    ParameterSpec,
    PooledToken,
    TensorSpec,
)
from turbo_tvm.compiler import targets
from turbo_tvm.compiler.lowering import Built
from turbo_tvm.compiler.pipeline import Optimized
from turbo_tvm.compiler.targets import CompileTarget
from turbo_tvm.compiler.tuned_kernels import Applied
from turbo_tvm.errors import UnsupportedModelError
from turbo_tvm.frontends.imported import Imported
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.ops.inputs import batch_shape, input_params, kind_of
from turbo_tvm.ops.operand import dims
from turbo_tvm.ops.pool import LARGEST
from turbo_tvm.passes.capture_graphs import captured
from turbo_tvm.schedules.cuda.tiles import CudaTiles

# Names that transformers gives outputs, the one that most users want first.
_MAIN_OUTPUTS = (
    "sentence_embedding",
    "text_embeds",
    "image_embeds",
    "logits",
    "last_hidden_state",
    "output",
    "output_0",
)


def manifest_of(
    imported: Imported, optimized: Optimized, built: Built, wanted: CompileTarget, tuned: Applied
) -> Manifest:
    """Return what the artifact of a compiled model says of itself; `link` adds what its GPU code says."""
    tiles = wanted.tiles
    inputs = [(p.name, str(p.ty.dtype)) for p in input_params(optimized.function)]
    outputs = tuple(_output(name, ty, optimized) for name, ty in zip(imported.output_names, built.outputs, strict=True))
    return Manifest(
        turbo_version=turbo_tvm.__version__,
        tvm_version=tvm.__version__,
        name=imported.name,
        model_type=imported.model_type,
        entry=ENCODE,
        captured=captured(ENCODE) if isinstance(tiles, CudaTiles) else None,
        target=targets.describe(wanted.name, wanted.machine),
        precision=wanted.precision,  # type: ignore[arg-type]
        layout=optimized.layout,  # type: ignore[arg-type]
        row_tile=tiles.row_tile,
        query_tile=tiles.query_tile,
        inputs=tuple(TensorSpec(n, dtype, kind_of(n).value) for n, dtype in inputs),  # type: ignore[arg-type]
        outputs=outputs,
        primary=_primary(imported.output_names),
        labels=_labels(imported, outputs),
        problem_type=imported.problem_type if any(o.name == LABELLED for o in outputs) else None,
        request_limits=imported.request_limits,
        positions=imported.positions,
        texts=imported.texts,
        relative_positions=optimized.relative_positions,
        pools_first=optimized.pools_first,
        pooled=_pooled(optimized.pooled_token),
        buffers=tuple(BufferSpec(**vars(b)) for b in built.memory.buffers),
        steps=built.memory.steps,
        parameters=tuple(ParameterSpec(n, tuple(a.shape), str(a.dtype)) for n, a in built.parameters.items()),  # type: ignore[arg-type]
        kernels=optimized.kernels_in(tuned.variants),
        tuning=tuple(f"{kernel}: {why}" for kernel, why in tuned.refused.items()),
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


def _output(name: str, ty: ir.Type, optimized: Optimized) -> OutputSpec:
    """Return how to read one output, from its type: rows per token or per sequence, and how many columns."""
    shape, first = dims(ty), batch_shape(optimized.function)
    if optimized.layout == "packed":
        per_token = shape[0].same_as(first[0])
        return OutputSpec(
            name, "token" if per_token else "sequence", shape[2] if len(shape) > 2 else 1, len(shape) == 2
        )
    length = first[1]  # of images it is a number
    per_token = len(shape) > 1 and (
        not isinstance(shape[1], int) or (isinstance(length, int) and len(shape) == 3 and shape[1] == length)
    )
    columns = shape[1 + per_token :]
    if len(columns) > 1:
        raise UnsupportedModelError(f"output {name!r} has rank {len(shape)}; at most a vector per token is supported")
    return OutputSpec(name, "token" if per_token else "sequence", columns[0] if columns else 1, not columns)


def _primary(names: tuple[str, ...]) -> str | None:
    return next((n for n in _MAIN_OUTPUTS if n in names), names[0] if len(names) == 1 else None)
