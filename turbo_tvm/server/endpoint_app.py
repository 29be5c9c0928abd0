"""An endpoint as an application: keys, request ids, errors, metrics, logs, and clients that hang up.

Starlette routes; the rest is plain ASGI, because a layer of Starlette's middleware costs as much as all that is done
here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from turbo_tvm.server import errors
from turbo_tvm.server.asgi import Receive, Scope, Send
from turbo_tvm.server.auth import is_allowed
from turbo_tvm.server.endpoint import Call, Endpoint, Reply, decoded, error_reply
from turbo_tvm.server.errors import Disconnected, Problem, problem_of
from turbo_tvm.server.request_body import read_body
from turbo_tvm.server.tracing import span

if TYPE_CHECKING:
    from turbo_tvm.server.context import Context

CLIENT_CLOSED = 499  # in logs: nginx's status for a client that hung up

_LOG = logging.getLogger("turbo_tvm.server")
_ACCESS = logging.getLogger("turbo_tvm.server.access")
_LONGEST_ID = 128


class EndpointApp:
    """An ASGI application that answers the requests to one endpoint."""

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
            if not call.closed:
                raise
            self._note(scope, call, CLIENT_CLOSED, "cancelled", started)
        else:
            self._note(scope, call, reply.status, outcome, started)

    async def _reply(self, call: Call, receive: Receive) -> Reply:
        endpoint = self._endpoint
        if not endpoint.open:
            self._check_key(call)
        if endpoint.method != "POST":
            return await endpoint.handle(call)
        try:
            call.raw = await read_body(call.headers, receive, self._context.settings.max_body_bytes)
        except Disconnected:
            call.closed = True
            raise
        call.received_s = time.monotonic()
        if self._decoder is not None:
            call.body = decoded(self._decoder, call.raw)
        watching = asyncio.create_task(_cancel_when_closed(call, receive, asyncio.current_task()))
        try:
            return await endpoint.handle(call)
        finally:
            watching.cancel()

    def _check_key(self, call: Call) -> None:
        headers = call.headers
        if not is_allowed(self._keys, headers.get(b"authorization", b""), headers.get(b"api-key", b"")):
            raise Problem(errors.UNAUTHORIZED, "a key is needed: Authorization: Bearer KEY")

    def _note(self, scope: Scope, call: Call, status: int, outcome: str, started: float) -> None:
        seconds = time.perf_counter() - started
        if self._endpoint.quiet:
            return
        self._context.metrics.request(self._endpoint.protocol.name, outcome, seconds)
        if self._context.settings.access_log:
            fields = {"id": call.id, "status": status, "ms": round(1e3 * seconds, 3)}
            _ACCESS.info("%s %s", scope["method"], scope["path"], extra={"fields": fields})


async def _cancel_when_closed(call: Call, receive: Receive, task: asyncio.Task | None) -> None:
    """Cancel the task when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.closed = True
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
    """Return the client's request id, if a log and a header can carry it; else a new one."""
    given = headers.get(b"x-request-id", b"")[: _LONGEST_ID + 1].decode("latin-1")
    if given and len(given) <= _LONGEST_ID and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(8)
