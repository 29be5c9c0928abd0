"""The application: every endpoint, as Starlette routes them, with what starts and stops around them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from turbo_tvm import config
from turbo_tvm.server import errors, logs, tracing
from turbo_tvm.server.context import Context
from turbo_tvm.server.endpoint import Call, Endpoint, Protocol, Reply, Served, error_reply, json_reply
from turbo_tvm.server.errors import Form, Problem, kserve_form, openai_form, tei_form
from turbo_tvm.server.kserve import http as kserve_http
from turbo_tvm.server.metrics import Metrics
from turbo_tvm.server.openai import endpoints as openai
from turbo_tvm.server.openapi import document
from turbo_tvm.server.repository import OpenFile, Repository, open_artifact
from turbo_tvm.server.settings import Settings
from turbo_tvm.server.tei import endpoints as tei

SERVER = Protocol("server", kserve_form)
SAMPLE_S = 1.0

_PAGE = Path(__file__).with_name("page")


@cache
def _page() -> bytes:
    return (_PAGE / "index.html").read_bytes()


async def _home(call: Call) -> Reply:
    return Reply(_page(), "text/html; charset=utf-8")


async def _metrics(call: Call) -> Reply:
    call.context.repository.sample()
    return Reply(*call.context.metrics.exposition())


async def _live(call: Call) -> Reply:
    return json_reply({})


async def _state(call: Call) -> Reply:
    """What the page shows."""
    context = call.context
    return json_reply({"models": [_state_of(model) for model in context.repository], "pid": os.getpid()})


def _state_of(model: Any) -> dict[str, Any]:
    known, manifest = model.engine.statistics, model.model.manifest
    return {
        "name": model.name,
        "precision": manifest.precision,
        "tokenizer": model.has_tokenizer,
        "kind": "embedding" if model.embedding is not None else "scores" if model.scores is not None else "tokens",
        "waiting": model.engine.waiting,
        "max_queue": model.engine.max_queue,
        "arena_bytes": model.model.memory_held,
        "answered": known.answered,
        "rejected": known.rejected,
        "cache_hits": known.cache_hits,
        "padding_waste": known.padding_waste,
        **model.live.state(),
    }


_EVERYBODY = [
    *kserve_http.ENDPOINTS,
    *openai.ENDPOINTS,
    *tei.ENDPOINTS,
    Endpoint("GET", "/health/live", SERVER, _live, "Whether the server is up", answer=dict, open=True, quiet=True),
    Endpoint(
        "GET",
        "/health/ready",
        tei.TEI,
        tei.health,
        "Whether requests are answered",
        answer=dict,
        statuses=(503,),
        open=True,
        quiet=True,
    ),
    Endpoint("GET", "/metrics", SERVER, _metrics, "For Prometheus", content_type="text/plain", quiet=True),
    Endpoint("GET", "/live", SERVER, _state, "What the live page shows", answer=dict, quiet=True),
    Endpoint("GET", "/", SERVER, _home, "The live page", content_type="text/html", open=True, quiet=True),
]


def endpoints() -> Sequence[Endpoint]:
    """All that the server has, but for its document and the page's files."""
    return _EVERYBODY


def create_app(settings: Settings, open_file: OpenFile = open_artifact) -> Starlette:
    """The ASGI application; models that are not there are loaded when it starts.

    open_file: how, from a path, with so many threads. `app.state.context` is the server's context.
    """
    metrics = Metrics()
    context = Context(settings, Repository(settings, metrics, open_file), metrics)
    described = orjson.dumps(document(_EVERYBODY, keyed=bool(settings.api_keys)))

    async def openapi(call: Call) -> Reply:
        return Reply(described)

    every = [*_EVERYBODY, Endpoint("GET", "/openapi.json", SERVER, openapi, "This document", open=True, quiet=True)]
    routes: list[Any] = [Route(e.path, Served(e, context), methods=[e.method]) for e in _ordered(every)]
    routes.append(Mount("/page", StaticFiles(directory=_PAGE)))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        logs.configure(settings.json_logs)
        tracing.start()
        async with AsyncExitStack() as stack:
            stack.callback(tracing.stop)
            stack.push_async_callback(asyncio.to_thread, context.repository.close)
            for path in settings.files:
                if path.stem not in context.repository:
                    await asyncio.to_thread(context.repository.add, path)
            if settings.grpc_port is not None:
                from turbo_tvm.server.kserve.grpc import start

                stack.push_async_callback((await start(context)).stop, settings.drain_s)
            sampling = asyncio.create_task(_sample(context))
            stack.callback(sampling.cancel)
            yield
            context.closing = True

    middleware = []
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
            )
        )
    handlers: Any = {404: _nothing_there, 405: _wrong_method}
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)
    app.state.context = context
    return app


def from_environment() -> Starlette:
    """The application of a worker process."""
    return create_app(Settings.from_json(config.server_settings()))


def _ordered(every: Sequence[Endpoint]) -> list[Endpoint]:
    """Paths without names first, so that none is taken for a name; the busiest need the fewest comparisons."""
    return sorted(every, key=lambda e: ("{" in e.path, e.method != "POST"))


async def _sample(context: Context) -> None:
    while True:
        with suppress(Exception):
            context.repository.sample()
        await asyncio.sleep(SAMPLE_S)


def _form_of(path: str) -> Form:
    """Whose client is probably asking."""
    return kserve_form if path.startswith("/v2") else openai_form if path.startswith("/v1") else tei_form


def _response(problem: Problem, request: Any, allow: str | None = None) -> Response:
    """What Starlette answers where no endpoint is."""
    reply = error_reply(problem, _form_of(request.url.path))
    headers = reply.headers if allow is None else reply.headers | {"allow": allow}
    return Response(reply.body, reply.status, headers, reply.content_type)


async def _nothing_there(request: Any, _: Exception) -> Response:
    problem = Problem(errors.NOT_FOUND, f"there is nothing at {request.url.path[:200]}: see /openapi.json")
    return _response(problem, request)


async def _wrong_method(request: Any, error: Any) -> Response:
    problem = Problem(errors.NOT_ALLOWED, f"{request.method} is not a method of {request.url.path[:200]}")
    return _response(problem, request, (error.headers or {}).get("Allow"))
