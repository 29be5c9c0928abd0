"""Spans go where OpenTelemetry's variables say, in the client's trace; without them there are none."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from running_server import running

from turbo_tvm.server import tracing

pytestmark = pytest.mark.xdist_group("server")

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collector():
    """A collector of OTLP over HTTP."""
    found = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            found.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", found
    server.shutdown()


def test_a_span_per_request(fake, collector, monkeypatch):
    address, found = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    with running({"fake": fake}) as server:
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "abc"}
        assert httpx.post(f"{server.url}/embed", json={"inputs": [1]}, headers=headers).status_code == 200
    spans = [s for request in found for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
    assert [span.name for span in spans] == ["POST /embed"]
    assert spans[0].trace_id.hex() == TRACE and spans[0].parent_span_id.hex() == "b7ad6b7169203331"
    attributes = {one.key: one.value.string_value for one in spans[0].attributes}
    assert attributes["turbo.request_id"] == "abc"


def test_without_an_exporter_there_are_none(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracing.start() is False
