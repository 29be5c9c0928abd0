"""ONNX files to Relax: what a file takes, what a request may hold, and what the file answers itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tvm import ir, tirx

from turbo_tvm.artifact.manifest import Bounds, PositionRule
from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.imported import DEFAULT_MAX_LENGTH, ImageSample, Imported, Sample
from turbo_tvm.frontends.onnx.file import load_file
from turbo_tvm.frontends.onnx.folder import Beside, beside
from turbo_tvm.frontends.onnx.graph import OnnxGraph
from turbo_tvm.frontends.onnx.inputs import OnnxInputs, read_inputs
from turbo_tvm.frontends.onnx.reference import Reference, random_images, random_sample
from turbo_tvm.frontends.patches import Size, patches_of
from turbo_tvm.passes.extract_inputs import Positions, extract_inputs
from turbo_tvm.passes.normalize import normalize
from turbo_tvm.passes.rewriter import is_call, shape_of
from turbo_tvm.passes.tabulate_positions import tabulate_positions

_SAMPLED = 150  # tokens of the batch that the compiled model is compared on: more than most windows


def import_file(
    path: Path,
    name: str | None = None,
    max_length: int | None = None,
    tokenizer: str | None = None,
    image_size: Size | None = None,
) -> Imported:
    """Import an encoder from an ONNX file of opset 11 to 23.

    Its inputs are token ids, attention mask and, where it has them, token types and positions, all (batch, length), of
    any integer or floating-point type; or images. Dimensions may be symbolic or fixed. max_length: the longest sequence
    in tokens; by default what its table of positions and a `config.json` beside it allow. tokenizer: by default the
    `tokenizer.json` beside it. image_size: of images, where the file leaves it open.

    Raises UnsupportedModelError with the reason.
    """
    try:
        found = beside(path)
        return _import(path, name or found.name, max_length, tokenizer or found.tokenizer, image_size, found)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever ONNX and TVM raise for a file that passed the checks
        raise UnsupportedModelError(f"{path} cannot be imported: {summary(error)}") from error


def _import(
    path: Path,
    name: str,
    max_length: int | None,
    tokenizer: str | None,
    image_size: Size | None,
    found: Beside,
) -> Imported:
    model = load_file(path)
    inputs = read_inputs(path, model, image_size)
    dims = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
    graph = OnnxGraph(model, inputs.parameters(*dims), dims, (inputs.batch, inputs.length))
    mod, weights = graph.run()
    reference = Reference(path, model)
    sample: Sample | ImageSample
    if inputs.image is not None:
        if max_length is not None:
            raise UnsupportedModelError(f"{path} takes images, so max_length={max_length} says nothing")
        mod, bounds = patches_of(mod, str(path))
        rule, sample = PositionRule("arange"), _image_sample(inputs, reference)
    else:
        if image_size is not None:
            raise UnsupportedModelError(f"{path} takes no images, so image_size={image_size} says nothing")
        limits = [*graph.sliced, *([inputs.length] if inputs.length else [])]
        mod, bounds, rule = _text(path, mod, inputs, limits, max_length, found.longest)
        batch = 2 * (inputs.batch or 1)
        length = min(_SAMPLED, bounds.max_length)
        sample = random_sample(reference, inputs, bounds, rule, np.random.default_rng(0), batch, length)
    return Imported(
        name=name,
        model_type="onnx",
        mod=mod,
        weights=weights,
        output_names=tuple(output.name for output in model.graph.output),
        bounds=bounds,
        positions=rule,
        parameter_count=sum(int(np.prod(w.shape)) for w in weights),
        tokenizer=tokenizer,
        labels=found.labels,
        sample=sample,
    )


def _text(
    path: Path,
    mod: ir.IRModule,
    inputs: OnnxInputs,
    limits: list[int],
    max_length: int | None,
    longest: int | None,
) -> tuple[ir.IRModule, Bounds, PositionRule]:
    """The module with positions as an input, what a request may hold, and how positions follow from token ids.

    limits: of the length in tokens, other than the table of positions. longest: what is usual, by a `config.json`.
    """
    mod, positions = extract_inputs(normalize(mod), *([min(limits)] if limits else []))
    rows = _table_rows(mod)
    if "input_ids" not in rows:
        raise UnsupportedModelError(f"{path}: no table of embeddings is looked up with {inputs.roles['input_ids']!r}")
    if "position_ids" in inputs.roles:  # those that a caller of the file supplies are counted from 0
        positions = Positions("arange", 0, None, rows.get("position_ids", 1 << 30))
    limits = [*limits, *([positions.longest] if positions else [])]
    bounds = Bounds(_max_length(limits, max_length, longest), rows["input_ids"], _token_types(inputs, rows))
    if positions is None or (positions.kind, positions.offset) == ("arange", 0):
        mod = tabulate_positions(mod, bounds.max_length)
    if positions is None:
        counted = any(p.name == "position_ids" for p in mod["main"].params)
        return mod, bounds, PositionRule("arange") if counted else PositionRule()
    return mod, bounds, PositionRule(positions.kind, positions.offset, positions.pad_id)  # type: ignore[arg-type]


def _image_sample(inputs: OnnxInputs, reference: Reference) -> ImageSample:
    pixels = random_images(inputs, np.random.default_rng(0), 2 * (inputs.batch or 1))
    return ImageSample(pixels, reference(inputs.feed_images(pixels), inputs.batch))


def _token_types(inputs: OnnxInputs, rows: dict[str, int]) -> int:
    """How many token types a request may name: one where the file itself takes none, but looks the first one up."""
    if "token_type_ids" not in rows:
        return 0
    return rows["token_type_ids"] if "token_type_ids" in inputs.roles else 1


def _table_rows(mod: ir.IRModule) -> dict[str, int]:
    """How many rows the table has that an input looks up, by input."""
    main = mod["main"]
    names = {p: p.name for p in main.params[: int(main.attrs["num_input"])]}
    rows: dict[str, int] = {}
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if is_call(value, "astype") and value.args[0] in names and "int" in str(value.attrs.dtype):
                names[binding.var] = names[value.args[0]]
            if is_call(value, "take") and value.args[1] in names and isinstance(shape_of(value.args[0])[0], int):
                name, size = names[value.args[1]], int(shape_of(value.args[0])[0])
                rows[name] = min(size, rows.get(name, size))
    return rows


def _max_length(limits: list[int], asked: int | None, usual: int | None) -> int:
    limit = min(limits) if limits else None
    if asked is not None and (asked < 1 or (limit is not None and asked > limit)):
        allowed = f"1 to {limit}" if limit is not None else "1 or more"
        raise UnsupportedModelError(f"max_length={asked} is not possible: the model has positions for {allowed} tokens")
    known = [n for n in (limit, usual) if n is not None]
    return asked or (min(known) if known else DEFAULT_MAX_LENGTH)
