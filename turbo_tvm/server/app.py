"""The application: the endpoints of every protocol, routed by Starlette, and what starts and stops with the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from turbo_tvm import config
from turbo_tvm.server import errors, logs, operations, tracing
from turbo_tvm.server.context import Context
from turbo_tvm.server.endpoint import Call, Endpoint, Reply, error_reply
from turbo_tvm.server.endpoint_app import EndpointApp
from turbo_tvm.server.errors import Form, Problem, kserve_form, openai_form, tei_form
from turbo_tvm.server.kserve import http as kserve_http
from turbo_tvm.server.metrics import Metrics
from turbo_tvm.server.openai import endpoints as openai
from turbo_tvm.server.openapi import document
from turbo_tvm.server.repository import OpenFile, Repository, open_artifact
from turbo_tvm.server.settings import Settings
from turbo_tvm.server.tei import endpoints as tei

SAMPLE_S = 1.0

_ENDPOINTS = [*kserve_http.ENDPOINTS, *openai.ENDPOINTS, *tei.ENDPOINTS, *operations.ENDPOINTS]


def endpoints() -> Sequence[Endpoint]:
    """Return all endpoints of the server, but for its OpenAPI document and the dashboard's files."""
    return _ENDPOINTS


def create_app(settings: Settings, open_file: OpenFile = open_artifact) -> Starlette:
    """Make the ASGI application. It loads the models that are not in its repository when it starts.

    open_file: called with the path of a file and the number of threads, to load a model.

    `app.state.context` is the server's `Context`.
    """
    metrics = Metrics()
    context = Context(settings, Repository(settings, metrics, open_file), metrics)
    described = orjson.dumps(document(_ENDPOINTS, keyed=bool(settings.api_keys)))

    async def openapi(call: Call) -> Reply:
        return Reply(described)

    every = [
        *_ENDPOINTS,
        Endpoint("GET", "/openapi.json", operations.SERVER, openapi, "This document", open=True, quiet=True),
    ]
    routes: list[Any] = [Route(e.path, EndpointApp(e, context), methods=[e.method]) for e in _ordered(every)]
    routes.append(Mount("/page", StaticFiles(directory=operations.PAGE)))

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
    """Make the application of a worker process, by the settings that its supervisor left."""
    return create_app(Settings.from_json(config.server_settings()))


def _ordered(every: Sequence[Endpoint]) -> list[Endpoint]:
    """Sort paths without names first, so that none is taken for a name, and POST first, so that it is found quickly."""
    return sorted(every, key=lambda e: ("{" in e.path, e.method != "POST"))


async def _sample(context: Context) -> None:
    while True:
        with suppress(Exception):
            context.repository.sample()
        await asyncio.sleep(SAMPLE_S)


def _form_of(path: str) -> Form:
    """Return the form of errors that a client of this path probably expects."""
    return kserve_form if path.startswith("/v2") else openai_form if path.startswith("/v1") else tei_form


def _response(problem: Problem, request: Any, allow: str | None = None) -> Response:
    """Make the answer where no endpoint is."""
    reply = error_reply(problem, _form_of(request.url.path))
    headers = reply.headers if allow is None else reply.headers | {"allow": allow}
    return Response(reply.body, reply.status, headers, reply.content_type)


async def _nothing_there(request: Any, _: Exception) -> Response:
    problem = Problem(errors.NOT_FOUND, f"there is nothing at {request.url.path[:200]}: see /openapi.json")
    return _response(problem, request)


async def _wrong_method(request: Any, error: Any) -> Response:
    problem = Problem(errors.NOT_ALLOWED, f"{request.method} is not a method of {request.url.path[:200]}")
    return _response(problem, request, (error.headers or {}).get("Allow"))
