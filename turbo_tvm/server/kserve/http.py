"""KServe v2 over HTTP: JSON, and the binary tensor extension."""

from __future__ import annotations

from typing import Any

import msgspec

from turbo_tvm.server import errors
from turbo_tvm.server.endpoint import Call, Endpoint, Protocol, Reply, decoded, json_reply
from turbo_tvm.server.errors import Problem, kserve_form
from turbo_tvm.server.kserve import inference as kserve
from turbo_tvm.server.kserve.types import (
    InferRequest,
    InferResponse,
    ModelIndex,
    ModelMetadata,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from turbo_tvm.server.tensors import Tensor, from_bytes, from_values, to_bytes

KSERVE = Protocol("kserve", kserve_form)
HEADER_LENGTH = "Inference-Header-Content-Length"

_DECODER = msgspec.json.Decoder(InferRequest)


async def _server(call: Call) -> Reply:
    return json_reply(kserve.server_metadata())


async def _live(call: Call) -> Reply:
    return json_reply({"live": True})


async def _ready(call: Call) -> Reply:
    ready = call.context.is_ready
    return json_reply({"ready": ready}, 200 if ready else 503)


async def _model(call: Call) -> Reply:
    return json_reply(kserve.model_metadata(_named(call)))


async def _model_ready(call: Call) -> Reply:
    return json_reply({"name": _named(call).name, "ready": True})


def _named(call: Call) -> Any:
    model = call.context.repository.get(call.path["name"])
    kserve.check_version(call.path.get("version", ""))
    return model


async def _infer(call: Call) -> Reply:
    model = _named(call)
    request, binary = _split(call)
    inputs = _tensors(request, binary)
    outputs = request.outputs or []
    found = await kserve.infer(call.context, model, inputs, [one.name for one in outputs], request.parameters)
    in_bytes = {one.name for one in outputs if one.parameters.get("binary_data")}
    if request.parameters.get("binary_data_output"):
        in_bytes |= {tensor.name for tensor in found} - {
            one.name for one in outputs if one.parameters.get("binary_data") is False
        }
    return _response(model.name, request.id, found, in_bytes)


def _split(call: Call) -> tuple[InferRequest, bytes]:
    """Return the request in the JSON, and the bytes after it. Raises Problem."""
    length = call.header(HEADER_LENGTH)
    if length is None:
        return decoded(_DECODER, call.raw), b""
    if not (length.isascii() and length.isdigit() and len(length) < 12 and int(length) <= len(call.raw)):
        raise Problem(errors.INVALID, f"{HEADER_LENGTH} is {length[:50]!r}, the body has {len(call.raw)} bytes")
    return decoded(_DECODER, call.raw[: int(length)]), call.raw[int(length) :]


def _tensors(request: InferRequest, binary: bytes) -> list[Tensor]:
    found, place = [], 0
    for one in request.inputs:
        size = one.parameters.get("binary_data_size")
        if size is None:
            if one.data is None:
                raise Problem(errors.INVALID, f"the input {one.name[:200]!r} has no data")
            found.append(from_values(one.name, one.datatype, one.shape, one.data))
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - place:
            raise Problem(errors.INVALID, f"the input {one.name[:200]!r}: its binary_data_size is not in the body")
        found.append(from_bytes(one.name, one.datatype, one.shape, binary[place : place + size]))
        place += size
    if place != len(binary):
        raise Problem(errors.INVALID, f"{len(binary) - place} bytes after the JSON belong to no input")
    if len({tensor.name for tensor in found}) < len(found):
        raise Problem(errors.INVALID, "two inputs have the same name")
    return found


def _response(name: str, request_id: str, tensors: list[Tensor], in_bytes: set[str]) -> Reply:
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for tensor in tensors:
        one: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)}
        if tensor.name in in_bytes:
            parts.append(to_bytes(tensor))
            one["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            one["data"] = tensor.array.reshape(-1)
        outputs.append(one)
    plain = {"id": request_id, "model_name": name, "model_version": kserve.VERSION, "outputs": outputs}
    reply = json_reply(plain)
    if parts:
        reply.headers[HEADER_LENGTH] = str(len(reply.body))
        reply.content_type = "application/octet-stream"
        reply.body = b"".join([reply.body, *parts])
    return reply


async def _index(call: Call) -> Reply:
    loaded = {model.name for model in call.context.repository}
    names = sorted(loaded | set(call.context.repository.files()))
    return json_reply([_indexed(name, name in loaded) for name in names])


def _indexed(name: str, ready: bool) -> dict[str, str]:
    state = ("READY", "") if ready else ("UNAVAILABLE", "not loaded")
    return {"name": name, "version": kserve.VERSION, "state": state[0], "reason": state[1]}


async def _load(call: Call) -> Reply:
    await call.context.repository.load(call.path["name"])
    return json_reply({})


async def _unload(call: Call) -> Reply:
    await call.context.repository.unload(call.path["name"])
    return json_reply({})


def _both(path: str, **options: Any) -> list[Endpoint]:
    """Return the endpoint of a model with and without a version in its path."""
    head, tail = path.split("{name}")
    return [
        Endpoint(path=path, protocol=KSERVE, **options),
        Endpoint(path=f"{head}{{name}}/versions/{{version}}{tail}", protocol=KSERVE, **options),
    ]


def _get(path: str, handle: Any, summary: str, answer: Any, **options: Any) -> Endpoint:
    return Endpoint("GET", path, KSERVE, handle, summary, answer=answer, **options)


_UNGUARDED: dict[str, Any] = {"open": True, "quiet": True}  # probes need no key and fill no log

ENDPOINTS = [
    _get("/v2", _server, "Name, version and extensions of this server", ServerMetadata),
    _get("/v2/health/live", _live, "Whether the server is up", ServerLive, **_UNGUARDED),
    _get("/v2/health/ready", _ready, "Whether requests are answered", ServerReady, statuses=(503,), **_UNGUARDED),
    *_both(
        "/v2/models/{name}",
        method="GET",
        handle=_model,
        summary="Inputs and outputs of a model",
        answer=ModelMetadata,
        statuses=(404,),
    ),
    *_both(
        "/v2/models/{name}/ready",
        method="GET",
        handle=_model_ready,
        summary="Whether a model answers",
        answer=ServerReady,
        statuses=(404,),
        quiet=True,
    ),
    *_both(
        "/v2/models/{name}/infer",
        method="POST",
        handle=_infer,
        summary="Answer tensors of texts, token ids or images",
        answer=InferResponse,
        described=InferRequest,
        statuses=(404, 424),
    ),
    Endpoint("POST", "/v2/repository/index", KSERVE, _index, "All models", answer=list[ModelIndex]),
    Endpoint(
        "POST", "/v2/repository/models/{name}/load", KSERVE, _load, "Load a model", answer=dict, statuses=(404, 405)
    ),
    Endpoint(
        "POST",
        "/v2/repository/models/{name}/unload",
        KSERVE,
        _unload,
        "Unload a model",
        answer=dict,
        statuses=(404, 405),
    ),
]
