"""ONNX files to Relax: which input is which, what a request may hold, and what the file answers itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import ir, relax, tirx

from turbo_tvm.errors import UnsupportedModelError, summary
from turbo_tvm.frontends.imported import DEFAULT_MAX_LENGTH, Imported, Sample
from turbo_tvm.frontends.onnx_file import load_file
from turbo_tvm.frontends.onnx_graph import OnnxGraph
from turbo_tvm.passes.extract_inputs import Positions, extract_inputs
from turbo_tvm.passes.normalize import normalize
from turbo_tvm.passes.rewriter import is_call, shape_of
from turbo_tvm.runtime.batch import ragged_positions
from turbo_tvm.runtime.manifest import Bounds, PositionRule

# Names that exporters give to inputs, by ours.
_INPUTS = {
    "input_ids": ("input_ids", "input", "tokens", "ids"),
    "attention_mask": ("attention_mask", "input_mask", "mask"),
    "token_type_ids": ("token_type_ids", "segment_ids"),
    "position_ids": ("position_ids",),
}


def import_file(
    path: Path, name: str | None = None, max_length: int | None = None, tokenizer: str | None = None
) -> Imported:
    """Import an encoder from an ONNX file of opset 11 to 23.

    Its inputs are token ids, attention mask and, where it has them, token types and positions, all (batch, length), of
    any integer or floating-point type; dimensions may be symbolic or fixed. max_length: the longest sequence in tokens;
    by default what its table of positions allows.

    Raises UnsupportedModelError with the reason.
    """
    model = load_file(path)
    roles = _roles(path, model)
    batch, length = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
    variables = {role: relax.Var(role, relax.TensorType((batch, length), "int64")) for role in roles}
    fixed = _fixed_dims(path, model, roles)
    graph = OnnxGraph(model, {given: variables[role] for role, given in roles.items()}, (batch, length), fixed)
    mod, weights = graph.run()
    mod, positions = extract_inputs(normalize(mod))
    positions = _given_positions(mod, roles) if positions is None else positions
    rows = _table_rows(mod)
    if "input_ids" not in rows:
        raise UnsupportedModelError(f"{path}: no table of token embeddings is looked up with {roles['input_ids']!r}")
    limit = _max_length(positions, [*graph.sliced, *(n for n in fixed[1:] if n)], max_length)
    types = (rows["token_type_ids"] if "token_type_ids" in roles else 1) if "token_type_ids" in rows else 0
    bounds = Bounds(limit, rows["input_ids"], types)
    rule = PositionRule() if positions is None else PositionRule(positions.kind, positions.offset, positions.pad_id)  # type: ignore[arg-type]
    return Imported(
        name=name or path.stem,
        model_type="onnx",
        mod=mod,
        weights=weights,
        output_names=tuple(output.name for output in model.graph.output),
        bounds=bounds,
        positions=rule,
        parameter_count=sum(w.numpy().size for w in weights),
        tokenizer=tokenizer,
        sample=_sample(path, model, roles, fixed, bounds, rule),
    )


def _roles(path: Path, model: onnx.ModelProto) -> dict[str, str]:
    """The names of the graph's inputs by what they are."""
    constants = {tensor.name for tensor in model.graph.initializer}
    given = [i for i in model.graph.input if i.name not in constants]
    roles: dict[str, str] = {}
    for role, names in _INPUTS.items():
        found = next((i.name for n in names for i in given if i.name == n), None)
        if found is not None:
            roles[role] = found
    left = [i.name for i in given if i.name not in roles.values()]
    missing = [role for role in ("input_ids", "attention_mask") if role not in roles]
    if left or missing:
        raise UnsupportedModelError(
            f"{path} takes {', '.join(i.name for i in given)}; an encoder with input_ids, attention_mask and, if it "
            f"has them, token_type_ids and position_ids is needed"
            + (f": {', '.join(missing)} is missing" if missing else f": {', '.join(left)} is not known")
        )
    for i in given:
        if len(i.type.tensor_type.shape.dim) != 2:
            raise UnsupportedModelError(f"{path}: the input {i.name} is not (batch, length)")
    return roles


def _given_positions(mod: ir.IRModule, roles: Mapping[str, str]) -> Positions | None:
    """Positions that the caller of the file supplies: they are counted from 0."""
    return (
        Positions("arange", 0, None, _table_rows(mod).get("position_ids", 1 << 30)) if "position_ids" in roles else None
    )


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


def _max_length(positions: Positions | None, sliced: list[int], asked: int | None) -> int:
    limits = [*sliced, *([positions.longest] if positions is not None else [])]
    limit = min(limits) if limits else None
    if asked is not None and (asked < 1 or (limit is not None and asked > limit)):
        raise UnsupportedModelError(
            f"max_length={asked} is not possible: the model has positions for 1 to {limit} tokens"
        )
    return asked or limit or DEFAULT_MAX_LENGTH


def _fixed_dims(path: Path, model: onnx.ModelProto, roles: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Batch and length where the file fixes them."""
    shapes = {i.name: [d.dim_value or None for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    found: list[int | None] = []
    for axis in range(2):
        numbers = {shapes[name][axis] for name in roles.values()} - {None}
        if len(numbers) > 1:
            raise UnsupportedModelError(f"{path}: its inputs have different dimensions: {shapes}")
        found.append(next(iter(numbers), None))
    return found[0], found[1]


def _sample(
    path: Path,
    model: onnx.ModelProto,
    roles: Mapping[str, str],
    fixed: tuple[int | None, int | None],
    bounds: Bounds,
    rule: PositionRule,
) -> Sample:
    """Sequences of different length and what the file answers."""
    batch, length = fixed[0] or 2, fixed[1] or min(7, bounds.max_length)
    rng = np.random.default_rng(0)
    ids = rng.integers(min(5, bounds.vocab_size - 1), bounds.vocab_size, (batch, length))
    ends = np.maximum(1, length - 3 * np.arange(0 if batch > 1 else 1, batch + (batch == 1)))
    mask = (np.arange(length)[None, :] < ends[:, None]).astype(np.int64)
    given = feeds(model, roles, ids, mask, rule)
    return Sample(ids, mask, reference(path, model)(given))


def feeds(
    model: onnx.ModelProto, roles: Mapping[str, str], ids: np.ndarray, mask: np.ndarray, rule: PositionRule
) -> dict[str, np.ndarray]:
    """The file's inputs for a padded batch, in its types."""
    positions = [ragged_positions(rule, row, np.array([0, len(row)], np.int32)) for row in ids.astype(np.int32)]
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.stack(positions),
    }
    types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input}
    return {name: values[role].astype(types[name]) for role, name in roles.items()}


def reference(path: Path, model: onnx.ModelProto) -> Any:
    """A function from inputs to outputs by name: ONNX Runtime's if it is installed, else ONNX's reference."""
    names = [output.name for output in model.graph.output]
    try:
        import onnxruntime
    except ImportError:
        return _by_reference(path, model, names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedModelError(f"{path} is refused by ONNX Runtime: {summary(error)}") from error
    return lambda given: dict(zip(names, session.run(names, given), strict=True))


def _by_reference(path: Path, model: onnx.ModelProto, names: list[str]) -> Any:
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{path}: ONNX's reference cannot run it ({summary(error)}), to compare answers: install ONNX Runtime "
            "(pip install 'turbo-tvm[onnx]')"
        ) from error
    return lambda given: dict(zip(names, evaluator.run(names, given), strict=True))
