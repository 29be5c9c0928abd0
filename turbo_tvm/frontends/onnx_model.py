"""ONNX files to Relax: what a file takes, what a request may hold, and what the file answers itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tvm import ir, relax, tirx

from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.imported import DEFAULT_MAX_LENGTH, Imported, Sample
from turbo_tvm.frontends.onnx_file import load_file
from turbo_tvm.frontends.onnx_graph import OnnxGraph
from turbo_tvm.frontends.onnx_inputs import OnnxInputs, read_inputs
from turbo_tvm.frontends.onnx_reference import Reference, random_batch
from turbo_tvm.passes.extract_inputs import Positions, extract_inputs
from turbo_tvm.passes.normalize import normalize
from turbo_tvm.passes.rewriter import is_call, shape_of
from turbo_tvm.runtime.manifest import Bounds, PositionRule


def import_file(
    path: Path, name: str | None = None, max_length: int | None = None, tokenizer: str | None = None
) -> Imported:
    """Import an encoder from an ONNX file of opset 11 to 23.

    Its inputs are token ids, attention mask and, where it has them, token types and positions, all (batch, length), of
    any integer or floating-point type; dimensions may be symbolic or fixed. max_length: the longest sequence in tokens;
    by default what its table of positions allows.

    Raises UnsupportedModelError with the reason.
    """
    try:
        return _import(path, name, max_length, tokenizer)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever ONNX and TVM raise for a file that passed the checks
        raise UnsupportedModelError(f"{path} cannot be imported: {summary(error)}") from error


def _import(path: Path, name: str | None, max_length: int | None, tokenizer: str | None) -> Imported:
    model = load_file(path)
    inputs = read_inputs(path, model)
    batch, length = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
    variables = {role: relax.Var(role, relax.TensorType((batch, length), "int64")) for role in inputs.roles}
    given = {name: variables[role] for role, name in inputs.roles.items()}
    graph = OnnxGraph(model, given, (batch, length), (inputs.batch, inputs.length))
    mod, weights = graph.run()
    mod, positions = extract_inputs(normalize(mod))
    rows = _table_rows(mod)
    if "input_ids" not in rows:
        raise UnsupportedModelError(f"{path}: no table of embeddings is looked up with {inputs.roles['input_ids']!r}")
    if "position_ids" in inputs.roles:  # those that a caller of the file supplies are counted from 0
        positions = Positions("arange", 0, None, rows.get("position_ids", 1 << 30))
    rule = PositionRule(positions.kind, positions.offset, positions.pad_id) if positions else PositionRule()  # type: ignore[arg-type]
    limits = [*graph.sliced, *([positions.longest] if positions else []), *([inputs.length] if inputs.length else [])]
    bounds = Bounds(_max_length(limits, max_length), rows["input_ids"], _token_types(inputs, rows))
    ids, mask = random_batch(inputs, bounds, np.random.default_rng(0), 2, min(7, bounds.max_length))
    return Imported(
        name=name or path.stem,
        model_type="onnx",
        mod=mod,
        weights=weights,
        output_names=tuple(output.name for output in model.graph.output),
        bounds=bounds,
        positions=rule,
        parameter_count=sum(int(np.prod(w.shape)) for w in weights),
        tokenizer=tokenizer,
        sample=Sample(ids, mask, Reference(path, model)(inputs.feed(ids, mask, rule))),
    )


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


def _max_length(limits: list[int], asked: int | None) -> int:
    limit = min(limits) if limits else None
    if asked is not None and (asked < 1 or (limit is not None and asked > limit)):
        raise UnsupportedModelError(
            f"max_length={asked} is not possible: the model has positions for 1 to {limit} tokens"
        )
    return asked or limit or DEFAULT_MAX_LENGTH
