"""What a server is told: one frozen record, which travels to its workers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How to serve. The command line explains each; `turbo-tvm serve --help`.

    files: artifacts, each a model named by its stem; the first is the one that is meant where a protocol names none.
    grpc_port: None for no gRPC. threads: of each model, None for all physical cores over the workers. max_tokens: of a
    batch, None for what the model runs at once. cache_bytes: of answers kept, per model. max_inputs: texts or sequences
    of one HTTP request. timeout_s: of a request; drain_s: for what was accepted before the server stops. models_dir:
    from where models may be loaded by API, None for nowhere.
    """

    files: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    workers: int = 1
    threads: int | None = None
    policy: str = "dp"
    max_batch: int = 64
    max_tokens: int | None = None
    max_queue: int = 1024
    cache_bytes: int = 32 << 20
    max_body_bytes: int = 16 << 20
    max_inputs: int = 1024
    timeout_s: float = 30.0
    drain_s: float = 30.0
    api_keys: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    cors_origins: tuple[str, ...] = ()
    models_dir: Path | None = None
    json_logs: bool = False
    access_log: bool = True

    def to_json(self) -> str:
        """As JSON text, paths as strings."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Settings:
        """The settings in a text of `to_json`."""
        plain: dict[str, Any] = json.loads(text)
        for field in fields(Settings):
            value = plain[field.name]
            if isinstance(value, list):
                plain[field.name] = tuple(value)
        plain["files"] = tuple(map(Path, plain["files"]))
        for name in ("tls_cert", "tls_key", "models_dir"):
            plain[name] = plain[name] and Path(plain[name])
        return Settings(**plain)
