"""`turbo-tvm serve`: serves artifacts over HTTP and gRPC."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from turbo_tvm.cli.options import debug_option

_PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "msgspec", "orjson", "prometheus_client")
_FILE = click.Path(path_type=Path)


@click.command("serve")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=_FILE)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address; 0.0.0.0 for every network of the machine."
)
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port of HTTP; 0 for any free one."
)
@click.option(
    "--grpc-port", metavar="N", type=click.IntRange(0, 65535), help="Port of gRPC (KServe v2).  [default: no gRPC]"
)
@click.option("--workers", metavar="N", default=1, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(1),
    help="Threads of each model in each process.  [default: physical cores divided by workers]",
)
@click.option(
    "--policy",
    default="dp",
    show_default=True,
    type=click.Choice(["dp", "dp_latency", "deadline", "token_budget", "naive", "nobatch"]),
    help="Policy that chooses batches.",
)
@click.option("--max-batch", default=64, show_default=True, type=click.IntRange(1), help="Sequences of a batch.")
@click.option("--max-tokens", metavar="N", type=click.IntRange(1), help="Tokens of a batch.  [default: 8192]")
@click.option(
    "--max-queue", default=1024, show_default=True, type=click.IntRange(1), help="Sequences that may wait; then 429."
)
@click.option("--cache-mb", default=32, show_default=True, type=click.IntRange(0), help="Cache of answers; 0: none.")
@click.option("--max-body-mb", default=16, show_default=True, type=click.IntRange(1), help="MB of a body; then 413.")
@click.option(
    "--max-inputs", default=2048, show_default=True, type=click.IntRange(1), help="Texts of a request; then 413."
)
@click.option(
    "--timeout",
    "timeout_s",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0.001),
    help="Seconds for an answer; then 504.",
)
@click.option(
    "--drain",
    "drain_s",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds to finish requests after SIGTERM.",
)
@click.option(
    "--api-key",
    "api_keys",
    metavar="KEY",
    multiple=True,
    envvar="TURBO_TVM_API_KEY",
    show_envvar=True,
    help="Key that every request needs; may be repeated.",
)
@click.option("--tls-cert", metavar="FILE", type=_FILE, help="Certificate, .pem; with --tls-key.")
@click.option("--tls-key", metavar="FILE", type=_FILE, help="Its private key, .pem.")
@click.option(
    "--cors",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help="Origin of web pages that may send requests; * for all.",
)
@click.option("--models-dir", metavar="DIR", type=_FILE, help="Folder from which clients may load models (KServe v2).")
@click.option("--json-logs", is_flag=True, help="Log a JSON object per line.")
@click.option("--access-log/--no-access-log", default=True, show_default=True, help="Log a line per request.")
@debug_option
def serve_command(files: tuple[Path, ...], cache_mb: int, max_body_mb: int, **options: Any) -> None:
    """Serve models over HTTP and gRPC, in batches that the scheduler chooses.

    A model is named by its file's stem. The server speaks three protocols: OpenAI (/v1/embeddings),
    text-embeddings-inference (/embed, /predict, /rerank, ...) and KServe v2 (/v2/models/NAME/infer, and gRPC). A
    dashboard is at /, metrics for Prometheus at /metrics, the OpenAPI document at /openapi.json. After SIGTERM it
    answers what it has accepted, and stops.

    \b
    Examples:
      turbo-tvm serve minilm.turbo
      turbo-tvm serve minilm.turbo reranker.turbo --host 0.0.0.0 --port 8000 --grpc-port 8001
      TURBO_TVM_API_KEY=secret turbo-tvm serve minilm.turbo --tls-cert cert.pem --tls-key key.pem
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if options["grpc_port"] is not None and importlib.util.find_spec("grpc") is None:
        missing.append("grpcio")
    if missing:
        raise click.ClickException(f"serving needs {', '.join(missing)}: pip install 'turbo-tvm[serve]'")
    if (options["tls_cert"] is None) != (options["tls_key"] is None):
        raise click.UsageError("TLS needs both --tls-cert and --tls-key")
    if not all(key and key == key.strip() for key in options["api_keys"]):
        raise click.UsageError("a key of --api-key or TURBO_TVM_API_KEY is empty, or has blanks around it")
    if options["grpc_port"] == 0 and options["workers"] > 1:
        raise click.UsageError("workers share a gRPC port: name one with --grpc-port")
    from turbo_tvm.server.serve import serve
    from turbo_tvm.server.settings import Settings

    settings = Settings(files=files, cache_bytes=cache_mb << 20, max_body_bytes=max_body_mb << 20, **options)
    raise SystemExit(serve(settings))
