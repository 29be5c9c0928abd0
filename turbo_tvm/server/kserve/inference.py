"""KServe v2, the Open Inference Protocol: the meaning of a request, for HTTP and gRPC alike.

Inputs. A request has one kind of them:

- `text`, BYTES (batch,), for models with a tokenizer, with `text_pair` of the same shape where each request is a pair;
- `input_ids`, INT32 or INT64 (batch, length), padded at the right, with `attention_mask` and `token_type_ids` of the
  same shape if need be;
- `pixel_values`, FP32 (batch, channels, height, width), for models of images.

Outputs are the model's, in FP32; rows per token are padded with 0. `embedding` is another name for an embedding model's
main output.

Parameters. `timeout` is in microseconds. Of `priority`, higher ones go first, unlike Triton's. With `truncate`, texts
that are too long are cut; without, they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turbo_tvm import __version__
from turbo_tvm.runtime.scheduling.engine import ALL_OUTPUTS
from turbo_tvm.runtime.text import Text
from turbo_tvm.server import embeddings, errors
from turbo_tvm.server.context import Context
from turbo_tvm.server.deadline import Deadline
from turbo_tvm.server.errors import Problem
from turbo_tvm.server.model_service import ModelService
from turbo_tvm.server.tensors import BYTES, Tensor, texts
from turbo_tvm.server.tokenization import EngineRequest

NAME = "turbo_tvm"
EXTENSIONS = ("binary_tensor_data", "model_repository", "parameters")
EMBEDDING = "embedding"
VERSION = "1"

_TEXT, _PAIR, _PIXELS = "text", "text_pair", "pixel_values"
_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"


def server_metadata() -> dict[str, Any]:
    """Return the metadata of this server."""
    return {"name": NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: ModelService) -> dict[str, Any]:
    """Return name, inputs and outputs of a model; -1 stands for a dimension that a request chooses."""
    inputs: list[dict[str, Any]] = []
    limits = model.model.manifest.request_limits
    if limits.image is not None:
        inputs.append(_spec(_PIXELS, "FP32", (-1, *limits.image.shape)))
    else:
        if model.has_tokenizer:
            inputs.append(_spec(_TEXT, BYTES, (-1,)))
            if model.scores is not None:
                inputs.append(_spec(_PAIR, BYTES, (-1,)))
        inputs += [_spec(name, "INT64", (-1, -1)) for name in (_IDS, _MASK)]
        if limits.type_vocab_size > 1:
            inputs.append(_spec(_TYPES, "INT64", (-1, -1)))
    outputs = [_output_spec(spec.name, spec) for spec in model.outputs]
    if model.embedding is not None and all(spec.name != EMBEDDING for spec in model.outputs):
        outputs.insert(0, _output_spec(EMBEDDING, model.embedding))
    return {"name": model.name, "versions": [VERSION], "platform": NAME, "inputs": inputs, "outputs": outputs}


def _spec(name: str, datatype: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def _output_spec(name: str, spec: Any) -> dict[str, Any]:
    rows = (-1,) if spec.kind == "sequence" else (-1, -1)
    return _spec(name, "FP32", rows if spec.squeeze else (*rows, spec.columns))


def check_version(version: str) -> None:
    """Raise Problem for a version of a model that there is not."""
    if version not in ("", VERSION):
        raise Problem(errors.NOT_FOUND, f"there is no version {version[:100]!r} of the model; versions: {VERSION}")


async def infer(
    context: Context,
    model: ModelService,
    inputs: Sequence[Tensor],
    outputs: Sequence[str],
    parameters: Mapping[str, Any],
) -> list[Tensor]:
    """Answer a request: return the outputs that are asked for.

    outputs: their names; by default `embedding`, else the main output, else all.

    Raises Problem for a wrong request, TurboError if the engine cannot answer it.
    """
    names, deadline = _wanted(model, outputs), _deadline(context, parameters)
    requests, shape = await _requests(context, model, {tensor.name: tensor for tensor in inputs}, deadline)
    if not parameters.get("truncate"):
        embeddings.check_whole(model, requests)
    real = list(dict.fromkeys(_real_name(model, name) for name in names))
    answers = await model.answer(requests, deadline, real[0] if len(real) == 1 else ALL_OUTPUTS)
    columns = {real[0]: answers} if len(real) == 1 else {name: [one[name] for one in answers] for name in real}
    kinds = {spec.name: spec.kind for spec in model.outputs}
    found = []
    for name in names:
        real_name = _real_name(model, name)
        parts = columns[real_name]
        found.append(Tensor(name, np.stack(parts) if kinds[real_name] == "sequence" else _padded(parts, shape)))
    return found


def _wanted(model: ModelService, outputs: Sequence[str]) -> list[str]:
    known = [spec.name for spec in model.outputs]
    if model.embedding is not None:
        known.append(EMBEDDING)
    for name in outputs:
        if name not in known:
            raise Problem(errors.INVALID, f"the model has no output {name[:200]!r}; it has {', '.join(known)}")
    if outputs:
        return list(dict.fromkeys(outputs))
    if model.embedding is not None:
        return [EMBEDDING]
    primary = model.model.manifest.primary
    return [primary] if primary is not None else known


def _real_name(model: ModelService, name: str) -> str:
    names = [spec.name for spec in model.outputs]
    return name if name in names or model.embedding is None else model.embedding.name


async def _requests(
    context: Context, model: ModelService, inputs: Mapping[str, Tensor], deadline: Deadline
) -> tuple[list[EngineRequest], int | None]:
    """Return the engine's requests, and the width of the matrix of token ids, None without one. Raises Problem."""
    if _TEXT in inputs:
        _only(inputs, _TEXT, _PAIR)
        embeddings.need_tokenizer(model)
        return await model.tokenization.tokenize(_texts(context, inputs), deadline), None
    if _PIXELS in inputs:
        _only(inputs, _PIXELS)
        if model.takes_text:
            raise Problem(errors.INVALID, f"the model {model.name} takes text or token ids, not {_PIXELS}")
        array = inputs[_PIXELS].array
        if array.ndim != 4 or array.dtype.kind not in "iuf":
            raise Problem(errors.INVALID, f"{_PIXELS} holds numbers, (batch, channels, height, width)")
        _check_count(context, len(array))
        return [EngineRequest(image) for image in array.astype(np.float32, copy=False)], None
    if _IDS not in inputs:
        known = [spec["name"] for spec in model_metadata(model)["inputs"]]
        raise Problem(errors.INVALID, f"there is no input that the model takes; it takes {', '.join(known)}")
    _only(inputs, _IDS, _MASK, _TYPES)
    if not model.takes_text:
        raise Problem(errors.INVALID, f"the model {model.name} takes {_PIXELS}, not {_IDS}")
    rows, width = _rows(context, inputs), inputs[_IDS].array.shape[1]
    if width > model.max_length:
        raise Problem(errors.INVALID, f"{_IDS} is {width} wide, the model takes {model.max_length} tokens at most")
    return rows, width


def _texts(context: Context, inputs: Mapping[str, Tensor]) -> list[Text]:
    """Return a text or a pair of texts per request."""
    for name in (_TEXT, _PAIR):
        if name in inputs and inputs[name].datatype != BYTES:
            raise Problem(errors.INVALID, f"the input {name} is of BYTES, not {inputs[name].datatype}")
    first = inputs[_TEXT]
    _check_count(context, first.array.size)
    if _PAIR not in inputs:
        return list(texts(first))
    if inputs[_PAIR].array.size != first.array.size:
        raise Problem(
            errors.INVALID, f"{_PAIR} holds {inputs[_PAIR].array.size} texts, {_TEXT} {first.array.size}: as many"
        )
    return list(zip(texts(first), texts(inputs[_PAIR]), strict=True))


def _rows(context: Context, inputs: Mapping[str, Tensor]) -> list[EngineRequest]:
    """Return a request per row of the matrix of token ids, without its padding."""
    ids = _integers(inputs[_IDS])
    _check_count(context, len(ids))
    mask = _integers(inputs[_MASK], ids.shape) if _MASK in inputs else np.ones_like(ids)
    types = _integers(inputs[_TYPES], ids.shape) if _TYPES in inputs else None
    lengths = (mask != 0).sum(1)
    found = []
    for i, length in enumerate(lengths.tolist()):
        if not (mask[i, :length] != 0).all():
            raise Problem(errors.INVALID, f"row {i} of {_MASK} has holes or padding at the left: pad at the right")
        if not length:
            raise Problem(errors.INVALID, f"row {i} of {_MASK} leaves no token")
        found.append(EngineRequest(ids[i, :length], None if types is None else types[i, :length]))
    return found


def _integers(tensor: Tensor, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = tensor.array
    if array.dtype == object or array.dtype.kind not in "iub" or array.ndim != 2:
        raise Problem(
            errors.INVALID, f"{tensor.name} holds integers, (batch, length), not {tensor.datatype} {array.shape}"
        )
    if shape is not None and array.shape != shape:
        raise Problem(errors.INVALID, f"{tensor.name} has the shape {array.shape}, {_IDS} {shape}: they must be equal")
    return array


def _only(inputs: Mapping[str, Tensor], *names: str) -> None:
    extra = [name for name in inputs if name not in names]
    if extra:
        raise Problem(errors.INVALID, f"with {names[0]}, the model takes no {', '.join(extra)[:200]}")


def _check_count(context: Context, count: int) -> None:
    if count < 1:
        raise Problem(errors.INVALID, "the batch is empty")
    if count > context.settings.max_inputs:
        raise Problem(
            errors.TOO_LARGE, f"{count} inputs are more than {context.settings.max_inputs}, the most of a request here"
        )


def _padded(parts: Sequence[np.ndarray], width: int | None) -> np.ndarray:
    """Return the rows per token of all sequences as one array, padded with 0 to `width`, or to the longest."""
    longest = width or max(len(part) for part in parts)
    found = np.zeros((len(parts), longest, *parts[0].shape[1:]), np.float32)
    for row, part in zip(found, parts, strict=True):
        row[: len(part)] = part
    return found


def _deadline(context: Context, parameters: Mapping[str, Any]) -> Deadline:
    timeout_us, priority = parameters.get("timeout"), parameters.get("priority", 0)
    for name, value in (("timeout", timeout_us), ("priority", priority)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63):
            raise Problem(errors.INVALID, f"the parameter {name} is a whole number from 0, not {str(value)[:100]!r}")
    limit = context.settings.timeout_s
    return Deadline(min(limit, timeout_us / 1e6) if timeout_us else limit, priority or 0)
