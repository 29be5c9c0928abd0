"""KServe v2 over gRPC: the service of the Open Inference Protocol, in the server's own event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from turbo_tvm.errors import TurboError
from turbo_tvm.server import errors
from turbo_tvm.server.auth import is_allowed
from turbo_tvm.server.context import Context
from turbo_tvm.server.errors import Problem, problem_of
from turbo_tvm.server.kserve import inference as kserve
from turbo_tvm.server.kserve.messages import SERVICE, message
from turbo_tvm.server.tensors import BYTES, Tensor, from_bytes, from_values, to_bytes

_LOG = logging.getLogger("turbo_tvm.server")
_ACCESS = logging.getLogger("turbo_tvm.server.access")
_OPEN = ("ServerLive", "ServerReady")  # methods that need no key
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}

Handle = Callable[[Context, Any], Awaitable[Any]]


async def start(context: Context) -> grpc.aio.Server:
    """Start a gRPC server on the settings' port, with TLS if they name a certificate.

    Raises TurboError if the port is taken.
    """
    settings = context.settings
    limits = [("grpc.max_receive_message_length", settings.max_body_bytes), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=[*limits, ("grpc.so_reuseport", int(settings.workers > 1))])
    handlers = {name: _method(context, name, handle) for name, handle in _METHODS.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_cert is not None and settings.tls_key is not None:
            pair = settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise TurboError(f"gRPC cannot listen on {address}, another program does: use another --grpc-port") from error
    await server.start()
    context.grpc_port = port
    _LOG.info("gRPC listens on %s:%d", settings.host, port)
    return server


def _method(context: Context, name: str, handle: Handle) -> Any:
    request_kind = message(f"{name}Request")

    async def call(body: bytes, rpc: grpc.aio.ServicerContext) -> Any:
        started, outcome, code = time.perf_counter(), "answered", "OK"
        metadata = {key: value for key, value in rpc.invocation_metadata() or ()}
        request_id = str(metadata.get("x-request-id") or secrets.token_hex(8))[:128]
        try:
            if name not in _OPEN:
                _check_key(context, metadata)  # before the request is parsed
            return await handle(context, _parsed(request_kind, body))
        except asyncio.CancelledError:
            outcome, code = "cancelled", "CANCELLED"
            raise
        except Exception as error:
            problem = problem_of(error)
            if problem.kind is errors.INTERNAL:
                _LOG.exception("request %s failed", request_id)
            outcome, code = problem.kind.outcome, problem.kind.grpc
            await rpc.abort(getattr(grpc.StatusCode, code), str(problem))
        finally:
            seconds = time.perf_counter() - started
            context.metrics.request("grpc", outcome, seconds)
            if context.settings.access_log and name == "ModelInfer":
                fields = {"id": request_id, "status": code, "ms": round(1e3 * seconds, 3)}
                _ACCESS.info("gRPC %s", name, extra={"fields": fields})

    return grpc.unary_unary_rpc_method_handler(call, None, message(f"{name}Response").SerializeToString)


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise Problem(errors.INVALID, f"the body is no {kind.DESCRIPTOR.name} of the inference protocol") from error


def _check_key(context: Context, metadata: dict[str, Any]) -> None:
    keys = [key.encode() for key in context.settings.api_keys]
    authorization, api_key = (str(metadata.get(name, "")).encode() for name in ("authorization", "api-key"))
    if not is_allowed(keys, authorization, api_key):
        raise Problem(errors.UNAUTHORIZED, "a key is needed, in the metadata: authorization: Bearer KEY")


async def _server_live(context: Context, request: Any) -> Any:
    return message("ServerLiveResponse")(live=True)


async def _server_ready(context: Context, request: Any) -> Any:
    return message("ServerReadyResponse")(ready=context.is_ready)


async def _model_ready(context: Context, request: Any) -> Any:
    try:
        context.repository.get(request.name)
        kserve.check_version(request.version)
    except Problem:
        return message("ModelReadyResponse")(ready=False)
    return message("ModelReadyResponse")(ready=True)


async def _server_metadata(context: Context, request: Any) -> Any:
    return message("ServerMetadataResponse")(**kserve.server_metadata())


async def _model_metadata(context: Context, request: Any) -> Any:
    kserve.check_version(request.version)
    found = kserve.model_metadata(context.repository.get(request.name))
    return message("ModelMetadataResponse")(**found)


async def _model_infer(context: Context, request: Any) -> Any:
    model = context.repository.get(request.model_name)
    kserve.check_version(request.model_version)
    wanted = [one.name for one in request.outputs]
    parameters = {name: _value(one) for name, one in request.parameters.items()}
    found = await kserve.infer(context, model, _tensors(request), wanted, parameters)
    answer = message("ModelInferResponse")(model_name=model.name, model_version=kserve.VERSION, id=request.id)
    for tensor in found:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
        answer.raw_output_contents.append(to_bytes(tensor))
    return answer


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _tensors(request: Any) -> list[Tensor]:
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise Problem(errors.INVALID, f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs")
    if raw:
        found = [
            from_bytes(one.name, one.datatype, one.shape, data) for one, data in zip(request.inputs, raw, strict=True)
        ]
    else:
        found = [_from_contents(one) for one in request.inputs]
    if len({tensor.name for tensor in found}) < len(found):
        raise Problem(errors.INVALID, "two inputs have the same name")
    return found


def _from_contents(one: Any) -> Tensor:
    field = _CONTENTS.get(one.datatype)
    if field is None:
        raise Problem(errors.INVALID, f"the input {one.name[:200]!r}: {one.datatype!r} travels in raw_input_contents")
    values = getattr(one.contents, field)
    return from_values(one.name, one.datatype, one.shape, list(values) if one.datatype == BYTES else np.array(values))


_METHODS: dict[str, Handle] = {
    "ServerLive": _server_live,
    "ServerReady": _server_ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _model_metadata,
    "ModelInfer": _model_infer,
}
