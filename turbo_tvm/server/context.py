"""The context that all endpoints of a server share: settings, models and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from turbo_tvm.server.metrics import Metrics
from turbo_tvm.server.repository import Repository
from turbo_tvm.server.settings import Settings


@dataclass
class Context:
    """The state of a server."""

    settings: Settings
    repository: Repository
    metrics: Metrics
    closing: bool = False  # whether the server is about to stop, and no longer ready
    grpc_port: int | None = None  # where gRPC listens; None without it

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered: there is a model, and the server is not about to stop."""
        return not self.closing and any(True for _ in self.repository)
