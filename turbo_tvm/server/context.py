"""What all endpoints of a server share: settings, models and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from turbo_tvm.server.metrics import Metrics
from turbo_tvm.server.repository import Repository
from turbo_tvm.server.settings import Settings


@dataclass
class Context:
    """closing: whether the server is about to stop: it is no longer ready then. grpc_port: where gRPC listens."""

    settings: Settings
    repository: Repository
    metrics: Metrics
    closing: bool = False
    grpc_port: int | None = None
