"""What every HTTP endpoint shares: body and its limits, keys, request ids, errors, metrics, logs, clients that leave.

An `Endpoint` is data: the routes and the OpenAPI document are made of the same list. Starlette routes; the rest is
plain ASGI, because a layer of Starlette's middleware costs as much as all that is done here.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from turbo_tvm.server import errors
from turbo_tvm.server.errors import Disconnected, Form, Problem, problem_of
from turbo_tvm.server.tracing import span

if TYPE_CHECKING:
    from turbo_tvm.server.context import Context

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = "application/json"
BODY_S = 60.0  # for a body to arrive
CLIENT_CLOSED = 499  # in logs: nginx's status for a client that hung up

_LOG = logging.getLogger("turbo_tvm.server")
_ACCESS = logging.getLogger("turbo_tvm.server.access")
_LONGEST_ID = 128
_AS_JSON = orjson.OPT_SERIALIZE_NUMPY


@dataclass(frozen=True)
class Protocol:
    """A family of endpoints. name: in metrics; form: how it spells errors."""

    name: str
    form: Form


@dataclass
class Reply:
    """An answer."""

    body: bytes
    content_type: str = JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200) -> Reply:
    """An answer in JSON; NumPy arrays are lists of numbers, float32 in as few digits as give the same float32."""
    return Reply(orjson.dumps(value, option=_AS_JSON), status=status)


@dataclass
class Call:
    """A request.

    body: decoded, of the endpoint's type; raw: as it came; begun: when it had come, of `time.monotonic()`; gone:
    whether the client has hung up.
    """

    context: Context
    id: str
    headers: Mapping[bytes, bytes]
    path: Mapping[str, str]
    raw: bytes = b""
    body: Any = None
    begun: float = field(default_factory=time.monotonic)
    gone: bool = False

    def header(self, name: str) -> str | None:
        """A header's value; None if it is not there."""
        value = self.headers.get(name.lower().encode("latin-1"))
        return None if value is None else value.decode("latin-1")


@dataclass(frozen=True)
class Endpoint:
    """One method of one path.

    body: the type that its JSON is decoded as, None where it has none or reads it itself; described, answer: the types
    of body and answer for the document; statuses: of errors that are its own; open: whether it needs no key; quiet:
    whether the log of requests and the metrics leave it out.
    """

    method: str
    path: str
    protocol: Protocol
    handle: Callable[[Call], Awaitable[Reply]]
    summary: str
    body: Any = None
    described: Any = None
    answer: Any = None
    statuses: tuple[int, ...] = ()
    open: bool = False
    quiet: bool = False
    content_type: str = JSON


class Served:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, context: Context):
        self._endpoint, self._context = endpoint, context
        self._decoder = None if endpoint.body is None else msgspec.json.Decoder(endpoint.body)
        self._keys = [key.encode() for key in context.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        endpoint, headers = self._endpoint, dict(scope["headers"])
        call = Call(self._context, _request_id(headers), headers, scope["path_params"])
        outcome = "answered"
        try:
            try:
                with span(endpoint, call):
                    reply = await self._reply(call, receive)
            except Disconnected:
                raise
            except Exception as error:
                problem = problem_of(error)
                if problem.kind is errors.INTERNAL:
                    _LOG.exception("request %s failed", call.id)
                outcome, reply = problem.kind.outcome, error_reply(problem, endpoint.protocol.form)
            await _send(send, reply, call.id)
        except (Disconnected, asyncio.CancelledError):
            if not call.gone:
                raise
            self._note(scope, call, CLIENT_CLOSED, "cancelled", started)
        else:
            self._note(scope, call, reply.status, outcome, started)

    async def _reply(self, call: Call, receive: Receive) -> Reply:
        endpoint = self._endpoint
        if self._keys and not endpoint.open:
            self._check_key(call)
        if endpoint.method != "POST":
            return await endpoint.handle(call)
        try:
            call.raw = await _body(call.headers, receive, self._context.settings.max_body_bytes)
        except Disconnected:
            call.gone = True
            raise
        call.begun = time.monotonic()
        if self._decoder is not None:
            call.body = decoded(self._decoder, call.raw)
        watching = asyncio.create_task(_cancel_when_gone(call, receive, asyncio.current_task()))
        try:
            return await endpoint.handle(call)
        finally:
            watching.cancel()

    def _check_key(self, call: Call) -> None:
        given = call.headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            key = call.headers.get(b"api-key", b"")
        if not any([hmac.compare_digest(key.strip(), known) for known in self._keys]):
            raise Problem(errors.UNAUTHORIZED, "a key is needed: Authorization: Bearer KEY")

    def _note(self, scope: Scope, call: Call, status: int, outcome: str, started: float) -> None:
        seconds = time.perf_counter() - started
        if self._endpoint.quiet:
            return
        self._context.metrics.request(self._endpoint.protocol.name, outcome, seconds)
        if self._context.settings.access_log:
            fields = {"id": call.id, "status": status, "ms": round(1e3 * seconds, 3)}
            _ACCESS.info("%s %s", scope["method"], scope["path"], extra={"fields": fields})


def error_reply(problem: Problem, form: Form) -> Reply:
    """The answer to a request that failed."""
    reply = json_reply(form(problem), problem.kind.status)
    if problem.kind in (errors.OVERLOADED, errors.UNAVAILABLE):
        reply.headers["retry-after"] = str(errors.RETRY_AFTER_S)
    if problem.kind is errors.UNAUTHORIZED:
        reply.headers["www-authenticate"] = "Bearer"
    return reply


def decoded(decoder: msgspec.json.Decoder, raw: bytes) -> Any:
    """A body as what its endpoint takes. Raises Problem: 400 for what is no JSON, 422 for what has another form."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise Problem(errors.UNPROCESSABLE, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(errors.INVALID, f"the body is no JSON: {error}") from None
    except RecursionError:
        raise Problem(errors.INVALID, "the body is nested too deeply") from None


async def _body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body. Raises Problem, or Disconnected."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    message = await _received(receive)
    begun = message.get("body", b"")
    if len(begun) > limit:
        raise _too_large(limit)
    if not message.get("more_body"):
        return begun
    try:
        return await asyncio.wait_for(_rest(begun, receive, limit), BODY_S)
    except asyncio.TimeoutError:
        raise Problem(errors.SLOW_BODY, f"the body did not arrive within {BODY_S:.0f} s") from None


async def _rest(begun: bytes, receive: Receive, limit: int) -> bytes:
    """A body that comes in several parts, of which this is the first."""
    parts, size, more = [begun], len(begun), True
    while more:
        message = await _received(receive)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _received(receive: Receive) -> MutableMapping[str, Any]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message


def _too_large(limit: int) -> Problem:
    return Problem(errors.TOO_LARGE, f"the body is larger than {limit:,} bytes, the limit of this server")


async def _cancel_when_gone(call: Call, receive: Receive, task: asyncio.Task | None) -> None:
    """Cancel the task when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.gone = True
    if task is not None:
        task.cancel()


async def _send(send: Send, reply: Reply, request_id: str) -> None:
    headers = [
        (b"content-type", reply.content_type.encode("latin-1")),
        (b"content-length", str(len(reply.body)).encode()),
        (b"x-request-id", request_id.encode("latin-1")),
        *((name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers.items()),
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def _request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's, if it is one that a log and a header can carry; else a new one."""
    given = headers.get(b"x-request-id", b"")[: _LONGEST_ID + 1].decode("latin-1")
    if given and len(given) <= _LONGEST_ID and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(8)
