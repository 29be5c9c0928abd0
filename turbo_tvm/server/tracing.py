"""OpenTelemetry spans, where its API is installed: one per request, in the trace that the client began.

OpenTelemetry's own variables say where they go (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from turbo_tvm import config

if TYPE_CHECKING:
    from turbo_tvm.server.endpoint import Call, Endpoint

_tracer: Any = None


def start() -> bool:
    """Begin to trace if the packages are installed and an exporter is named; return whether it does."""
    global _tracer
    service = config.traced_service()
    if service is None:
        return False
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return False
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _tracer = trace.get_tracer("turbo_tvm.server")
    return True


def stop() -> None:
    """Stop tracing, and send the spans that are left."""
    global _tracer
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_tracer_provider().shutdown()  # type: ignore[attr-defined]
        _tracer = None


def span(endpoint: Endpoint, call: Call) -> AbstractContextManager[Any]:
    """Return a context manager that makes a span of a request; it does nothing where tracing is off."""
    if _tracer is None:
        return nullcontext()
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in call.headers.items()}
    attributes = {"http.request.method": endpoint.method, "http.route": endpoint.path, "turbo.request_id": call.id}
    return _tracer.start_as_current_span(
        f"{endpoint.method} {endpoint.path}", context=extract(carrier), kind=SpanKind.SERVER, attributes=attributes
    )
