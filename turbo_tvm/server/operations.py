"""Endpoints for operators: liveness, readiness, metrics and the dashboard page."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from turbo_tvm.server.endpoint import Call, Endpoint, Protocol, Reply, json_reply
from turbo_tvm.server.errors import kserve_form
from turbo_tvm.server.model_service import ModelService
from turbo_tvm.server.tei import endpoints as tei

SERVER = Protocol("server", kserve_form)
PAGE = Path(__file__).with_name("page")  # the folder of the dashboard's page


@cache
def _page() -> bytes:
    return (PAGE / "index.html").read_bytes()


async def _home(call: Call) -> Reply:
    return Reply(_page(), "text/html; charset=utf-8")


async def _metrics(call: Call) -> Reply:
    call.context.repository.sample()
    return Reply(*call.context.metrics.exposition())


async def _live(call: Call) -> Reply:
    return json_reply({})


async def _dashboard(call: Call) -> Reply:
    """Answer with what the dashboard shows, of this worker process."""
    context = call.context
    return json_reply({"models": [_state_of(model) for model in context.repository], "pid": os.getpid()})


def _state_of(service: ModelService) -> dict[str, Any]:
    statistics, manifest = service.engine.statistics, service.model.manifest
    return {
        "name": service.name,
        "precision": manifest.precision,
        "tokenizer": service.has_tokenizer,
        "kind": "embedding" if service.embedding is not None else "scores" if service.scores is not None else "tokens",
        "waiting": service.engine.waiting,
        "max_queue": service.engine.max_queue,
        "arena_bytes": service.model.memory_held,
        "answered": statistics.answered,
        "rejected": statistics.rejected,
        "cache_hits": statistics.cache_hits,
        "padding_waste": statistics.padding_waste,
        **service.dashboard.state(),
    }


ENDPOINTS = [
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
    Endpoint("GET", "/metrics", SERVER, _metrics, "Metrics for Prometheus", content_type="text/plain", quiet=True),
    Endpoint("GET", "/dashboard/state", SERVER, _dashboard, "What the dashboard shows", answer=dict, quiet=True),
    Endpoint("GET", "/", SERVER, _home, "The dashboard", content_type="text/html", open=True, quiet=True),
]
