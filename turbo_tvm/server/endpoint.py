"""HTTP endpoints as data: the routes and the OpenAPI document are made of the same list of them.

A new endpoint is one more `Endpoint` in the list ENDPOINTS of its protocol.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from turbo_tvm.server import errors
from turbo_tvm.server.errors import Form, Problem

if TYPE_CHECKING:
    from turbo_tvm.server.context import Context
    from turbo_tvm.server.model_service import ModelService

JSON = "application/json"
_AS_JSON = orjson.OPT_SERIALIZE_NUMPY


@dataclass(frozen=True)
class Protocol:
    """A family of endpoints."""

    name: str  # in metrics
    form: Form  # makes the body of an error


@dataclass
class Reply:
    """An answer."""

    body: bytes
    content_type: str = JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200) -> Reply:
    """Return an answer in JSON. NumPy arrays become lists, float32 in as few digits as give the same float32."""
    return Reply(orjson.dumps(value, option=_AS_JSON), status=status)


@dataclass
class Call:
    """A request."""

    context: Context
    id: str
    headers: Mapping[bytes, bytes]
    path: Mapping[str, str]  # the values of names in the endpoint's path
    raw: bytes = b""  # the body as it came
    body: Any = None  # decoded, of the endpoint's type
    received_s: float = field(default_factory=time.monotonic)  # when the body had come, by `time.monotonic()`
    closed: bool = False  # whether the client has hung up

    @property
    def named_model(self) -> ModelService:
        """The model that the path names, or the server's first. Raises Problem where there is none."""
        return self.context.repository.get(self.path.get("name"))

    def header(self, name: str) -> str | None:
        """Return a header's value; None if it is not there."""
        value = self.headers.get(name.lower().encode("latin-1"))
        return None if value is None else value.decode("latin-1")


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    protocol: Protocol
    handle: Callable[[Call], Awaitable[Reply]]
    summary: str  # for the OpenAPI document
    body: Any = None  # the type to decode a JSON body as; None where there is none, or `handle` reads it
    described: Any = None  # the type of the body in the document, where `handle` reads it
    answer: Any = None  # the type of the answer in the document
    statuses: tuple[int, ...] = ()  # of errors beside those of every endpoint
    open: bool = False  # whether it needs no key
    quiet: bool = False  # whether it is left out of the request log and the metrics
    content_type: str = JSON


def error_reply(problem: Problem, form: Form) -> Reply:
    """Return the answer to a request that failed."""
    reply = json_reply(form(problem), problem.kind.status)
    if problem.kind in (errors.OVERLOADED, errors.UNAVAILABLE):
        reply.headers["retry-after"] = str(errors.RETRY_AFTER_S)
    if problem.kind is errors.UNAUTHORIZED:
        reply.headers["www-authenticate"] = "Bearer"
    return reply


def _without_nulls(value: Any) -> Any:
    """Return a JSON value without the fields that are null: some clients send every field that they know."""
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(one) for name, one in value.items() if one is not None}


def decoded(decoder: msgspec.json.Decoder, raw: bytes) -> Any:
    """Decode a body as the type that its endpoint takes; a field that is null is one that is not there.

    Raises Problem: 400 for what is no JSON, 422 for JSON of another form.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        try:
            return msgspec.convert(_without_nulls(msgspec.json.decode(raw)), decoder.type)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # what follows may be no JSON at all
            raise Problem(errors.UNPROCESSABLE, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(errors.INVALID, f"the body is no JSON: {error}") from None
    except RecursionError:
        raise Problem(errors.INVALID, "the body is nested too deeply") from None
