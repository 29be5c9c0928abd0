"""The settings of a server: one frozen record, which is passed to its workers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How to serve. `turbo-tvm serve --help` explains each."""

    # artifacts, each a model named by the file's stem; the first is used where a protocol names none
    files: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None  # None for no gRPC
    workers: int = 1  # processes
    threads: int | None = None  # of each model; None for all physical cores divided by the workers
    policy: str = "dp"  # of the batch scheduler
    max_batch: int = 64  # sequences of a batch
    max_tokens: int | None = None  # tokens of a batch; None for what the model runs at once
    max_queue: int = 1024  # requests of a model that may wait
    cache_bytes: int = 32 << 20  # of answers that are kept, per model
    max_body_bytes: int = 16 << 20  # of one HTTP request
    max_inputs: int = 2048  # texts or sequences of one HTTP request
    timeout_s: float = 30.0  # of a request
    drain_s: float = 30.0  # to answer what was accepted before the server stops
    api_keys: tuple[str, ...] = ()  # of which a client needs one; none for an open server
    tls_cert: Path | None = None
    tls_key: Path | None = None
    cors_origins: tuple[str, ...] = ()
    models_dir: Path | None = None  # from which clients may load models; None forbids it
    json_logs: bool = False
    access_log: bool = True  # a line per request

    def to_json(self) -> str:
        """Return the settings as JSON text, paths as strings."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Settings:
        """Read settings from the text that `to_json` made."""
        plain: dict[str, Any] = json.loads(text)
        for field in fields(Settings):
            value = plain[field.name]
            if isinstance(value, list):
                plain[field.name] = tuple(value)
        plain["files"] = tuple(map(Path, plain["files"]))
        for name in ("tls_cert", "tls_key", "models_dir"):
            plain[name] = plain[name] and Path(plain[name])
        return Settings(**plain)
