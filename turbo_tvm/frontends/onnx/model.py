"""Import ONNX files: what a file takes, what a request may hold, and what the file answers itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import tvm
from tvm import ir, tirx

from turbo_tvm.artifact.manifest import PositionRule, RequestLimits
from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends import import_passes
from turbo_tvm.frontends.imported import Imported, inputs_of
from turbo_tvm.frontends.onnx.file import load_file
from turbo_tvm.frontends.onnx.folder import beside
from turbo_tvm.frontends.onnx.graph import OnnxGraph
from turbo_tvm.frontends.onnx.inputs import OnnxInputs, read_inputs
from turbo_tvm.frontends.onnx.reference import Reference, image_sample, text_sample
from turbo_tvm.frontends.onnx.sentence import add_modules
from turbo_tvm.frontends.options import DEFAULT_MAX_LENGTH, DEFAULTS, ImportOptions
from turbo_tvm.frontends.patches import patches_of
from turbo_tvm.frontends.sample import ImageSample, Sample, spread_lengths
from turbo_tvm.frontends.sentence_modules import SentenceModules
from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.ops.inputs import InputKind, input_params, kind_of
from turbo_tvm.passes.extract_inputs import Positions
from turbo_tvm.passes.rewriter import is_call, shape_of

_SAMPLED = 150  # tokens of the batch that the compiled model is compared on: more than most windows
_UNLIMITED = 1 << 30  # tokens


def import_file(path: Path, options: ImportOptions = DEFAULTS) -> Imported:
    """Import an encoder from an ONNX file of opset 11 to 23.

    Its inputs are token ids, attention mask and, where it has them, token types and positions, all (batch, length), of
    any integer or floating-point type; or images. Dimensions may be symbolic or fixed.

    options: name and tokenizer are those beside the file by default, max_length what its table of positions and a
        `config.json` beside it allow. image_size is for files of images that leave it open.

    Raises UnsupportedModelError with the reason.
    """
    try:
        return _import(path, options)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever ONNX and TVM raise for a file that passed the checks
        raise UnsupportedModelError(f"{path} cannot be imported: {summary(error)}") from error


@dataclass(frozen=True)
class _Read:
    """A file's graph as a module, before import passes."""

    path: Path
    inputs: OnnxInputs
    mod: ir.IRModule  # `main(inputs..., weights...)`, inputs as the file has them
    weights: list[tvm.runtime.Tensor]  # the values of the weight parameters
    reference: Reference  # what answers for the file
    limits: tuple[int, ...]  # of the length in tokens, other than a table of positions


@dataclass(frozen=True)
class _Fed:
    """The module that is compiled, and what must be known to feed it."""

    mod: ir.IRModule
    request_limits: RequestLimits
    positions: PositionRule
    samples: tuple[Sample | ImageSample, ...]


def _import(path: Path, options: ImportOptions) -> Imported:
    found = beside(path)
    options = options.or_else(found.name, found.texts)
    model = load_file(path)
    read = _read(path, model, options, found.modules)
    fed = _images(read, options) if read.inputs.image is not None else _texts(read, options)
    return Imported(
        name=options.name or found.name,
        model_type="onnx",
        mod=fed.mod,
        weights=read.weights,
        output_names=tuple(output.name for output in model.graph.output),
        request_limits=fed.request_limits,
        positions=fed.positions,
        parameter_count=sum(int(np.prod(w.shape)) for w in read.weights),
        tokenizer=options.tokenizer,
        texts=options.texts,
        labels=found.labels,
        problem_type=found.problem_type,
        samples=fed.samples,
    )


def _read(path: Path, model: onnx.ModelProto, options: ImportOptions, modules: SentenceModules | None) -> _Read:
    inputs = read_inputs(path, model, options.image_size)
    tail = add_modules(model, inputs, modules)
    dims = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
    graph = OnnxGraph(model, inputs.parameters(*dims), dims, (inputs.batch, inputs.length))
    mod, weights = graph.run()
    limits = (*graph.sliced, *([inputs.length] if inputs.length else []))
    return _Read(path, inputs, mod, weights, Reference(path, model, tail), limits)


def _images(read: _Read, options: ImportOptions) -> _Fed:
    """Put patches in the place of images. Raises UnsupportedModelError for a graph without patches."""
    if options.max_length is not None:
        raise UnsupportedModelError(f"{read.path} takes images, so max_length={options.max_length} says nothing")
    mod, allowed = patches_of(read.mod, str(read.path))
    sample = image_sample(read.reference, read.inputs, np.random.default_rng(0), _sample_size(read.inputs))
    return _Fed(mod, allowed, PositionRule("arange"), (sample,))


def _texts(read: _Read, options: ImportOptions) -> _Fed:
    """Make positions an input, and find out what a request may hold.

    Raises UnsupportedModelError for a graph that looks no token ids up, and for a length that is not possible.
    """
    if options.image_size is not None:
        raise UnsupportedModelError(f"{read.path} takes no images, so image_size={options.image_size} says nothing")
    mod, found = import_passes.texts(read.mod, min(read.limits, default=None))
    rows = _table_rows(mod)
    if InputKind.TOKEN_IDS not in rows:
        name = read.inputs.names[InputKind.TOKEN_IDS]
        raise UnsupportedModelError(f"{read.path}: no table of embeddings is looked up with {name!r}")
    if InputKind.POSITION_IDS in read.inputs.names:  # those that a caller of the file supplies are counted from 0
        found = Positions("arange", 0, None, rows.get(InputKind.POSITION_IDS, _UNLIMITED))
    limits = [*read.limits, *([found.longest] if found else [])]
    longest = _max_length(limits, options.max_length, options.usual_length)
    allowed = RequestLimits(longest, rows[InputKind.TOKEN_IDS], _token_types(read.inputs, rows))
    if found is None or (found.kind, found.offset) == ("arange", 0):
        mod = import_passes.tabulated(mod, allowed.max_length)
    rule = _position_rule(mod, found)
    shapes = [(_sample_size(read.inputs), min(_SAMPLED, longest))]
    if read.inputs.length is None:
        shapes += [(read.inputs.batch or 1, length) for length in spread_lengths(longest) if length > _SAMPLED]
    rng = np.random.default_rng(0)
    samples = tuple(text_sample(read.reference, read.inputs, (allowed, rule), rng, shape) for shape in shapes)
    return _Fed(mod, allowed, rule, samples)


def _sample_size(inputs: OnnxInputs) -> int:
    """Return how many requests are compared: as often as the file takes at once, twice."""
    return 2 * (inputs.batch or 1)


def _position_rule(mod: ir.IRModule, found: Positions | None) -> PositionRule:
    """Return how position ids follow from token ids: as found in the graph, else from 0 on if they are an input."""
    if found is not None:
        return PositionRule(found.kind, found.offset, found.pad_id)  # type: ignore[arg-type]
    return PositionRule("arange") if InputKind.POSITION_IDS in inputs_of(mod) else PositionRule()


def _token_types(inputs: OnnxInputs, rows: dict[InputKind, int]) -> int:
    """Return how many token types a request may name: one if the file takes none, but looks the first one up."""
    if InputKind.TOKEN_TYPE_IDS not in rows:
        return 0
    return rows[InputKind.TOKEN_TYPE_IDS] if InputKind.TOKEN_TYPE_IDS in inputs.names else 1


def _table_rows(mod: ir.IRModule) -> dict[InputKind, int]:
    """Return how many rows the table has that an input looks up, by input."""
    main = mod[ENCODE]
    kinds = {p: kind_of(p.name) for p in input_params(main)}
    rows: dict[InputKind, int] = {}
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if is_call(value, "astype") and value.args[0] in kinds and "int" in str(value.attrs.dtype):
                kinds[binding.var] = kinds[value.args[0]]
            if is_call(value, "take") and value.args[1] in kinds and isinstance(shape_of(value.args[0])[0], int):
                kind, size = kinds[value.args[1]], int(shape_of(value.args[0])[0])
                rows[kind] = min(size, rows.get(kind, size))
    return rows


def _max_length(limits: list[int], asked: int | None, usual: int | None) -> int:
    """Return the longest sequence in tokens: what is asked for, if no limit is shorter."""
    limit = min(limits) if limits else None
    if asked is not None and (asked < 1 or (limit is not None and asked > limit)):
        allowed = f"1 to {limit}" if limit is not None else "1 or more"
        raise UnsupportedModelError(f"max_length={asked} is not possible: the model has positions for {allowed} tokens")
    known = [n for n in (limit, usual) if n is not None]
    return asked or (min(known) if known else DEFAULT_MAX_LENGTH)
