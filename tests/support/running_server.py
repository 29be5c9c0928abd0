"""A server in a thread of the test's process, on ports that are free."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fake_model import FakeModel
from prometheus_client.parser import text_string_to_metric_families

from turbo_tvm.artifact.manifest import OutputSpec
from turbo_tvm.server.app import create_app
from turbo_tvm.server.context import Context
from turbo_tvm.server.serve import bind, uvicorn_config
from turbo_tvm.server.settings import Settings


class FakeEmbedder(FakeModel):
    """Its embedding of a sequence is (sum of the ids, length)."""

    has_tokenizer = False
    memory_held = 12345

    def __init__(self) -> None:
        super().__init__()
        from dataclasses import replace

        outputs = (OutputSpec("sentence_embedding", "sequence", 2),)
        self.manifest = replace(self.manifest, outputs=outputs, primary="sentence_embedding")

    def output_name(self, asked: str | None) -> str | None:
        return "sentence_embedding"


@dataclass
class Running:
    """url: of HTTP; grpc: "host:port" of gRPC."""

    url: str
    port: int
    grpc: str
    context: Context
    server: Any

    def model(self, name: str | None = None) -> Any:
        return self.context.repository.get(name).model


@contextmanager
def running(files: dict[str, Any] | list[Path], *, open_file: Any = None, **options: Any) -> Iterator[Running]:
    """Serve files, or models by the names that their files would have. open_file: as `create_app` takes it."""
    models = files if isinstance(files, dict) else None
    paths = tuple(Path(f"{name}.turbo") for name in models) if models is not None else tuple(files)
    settings = Settings(files=paths, **{"port": 0, "grpc_port": 0, "access_log": False, **options})
    if open_file is None and models is not None:

        def open_file(path: Path, threads: int | None) -> Any:
            return models[path.stem]

    app = create_app(settings) if open_file is None else create_app(settings, open_file)
    with bind(settings) as listening:
        server = uvicorn.Server(uvicorn_config(app, settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        port = listening.getsockname()[1]
        context = app.state.context
        scheme = "https" if settings.tls_cert else "http"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            yield Running(f"{scheme}://{host}:{port}", port, f"{host}:{context.grpc_port}", context, server)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def exact(found: Any, wanted: Any) -> None:
    """The same float32 numbers, bit by bit."""
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


def scraped(url: str) -> dict[tuple, float]:
    """The samples of /metrics, by name and labels."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }
