"""Running a server: in one process, or in several that listen on the same socket and share their metrics."""

from __future__ import annotations

import logging
import signal
import socket
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from turbo_tvm import config
from turbo_tvm.artifact import file as artifact
from turbo_tvm.errors import TurboError
from turbo_tvm.server import logs
from turbo_tvm.server.settings import Settings

if TYPE_CHECKING:
    import uvicorn

_LOG = logging.getLogger("turbo_tvm.server")
_NOT_STARTED = 3  # uvicorn's exit status of a worker whose application did not start


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C; what was accepted is answered first. Returns the exit status.

    Raises TurboError for files that are not there and ports that are taken.
    """
    for path in settings.files:
        if not path.is_file():
            raise TurboError(f"there is no file {path}: compile a model first, `turbo-tvm compile MODEL -o {path}`")
    for pem in (settings.tls_cert, settings.tls_key):
        if pem is not None and not pem.is_file():
            raise TurboError(f"there is no file {pem} for TLS")
    config.tokenize_in_one_thread()
    logs.configure(settings.json_logs)
    with bind(settings) as listening:
        return _one(settings, listening) if settings.workers == 1 else _several(settings, listening)


def url(settings: Settings, port: int) -> str:
    """Return the server's address."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http{'s' if settings.tls_cert else ''}://{host}:{port}"


def _one(settings: Settings, listening: socket.socket) -> int:
    import uvicorn

    from turbo_tvm.server.app import create_app

    app = create_app(settings)
    for path in settings.files:
        app.state.context.repository.add(path)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.context.closing = True
            super().handle_exit(sig, frame)

    server = Server(uvicorn_config(app, settings))
    _say_where(settings, listening)
    # uvicorn raises the signal again when it has stopped: that would end the process with the signal's status.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])
    return 0 if server.started else 1


def _several(settings: Settings, listening: socket.socket) -> int:
    from uvicorn.supervisors import Multiprocess

    for path in settings.files:
        artifact.read(path)  # a file that cannot be used is reported once, and not by every worker
    shared = settings.threads or max(1, config.physical_cores() // settings.workers)
    with tempfile.TemporaryDirectory(prefix="turbo_tvm_metrics_") as folder:
        config.tell_workers(replace(settings, threads=shared).to_json(), folder)
        made = uvicorn_config("turbo_tvm.server.app:from_environment", settings)
        made.factory, made.workers = True, settings.workers
        _say_where(settings, listening)
        supervisor = Multiprocess(made, sockets=[listening])
        supervisor.run()
    return int(any(process.process.exitcode == _NOT_STARTED for process in supervisor.processes))


def _say_where(settings: Settings, listening: socket.socket) -> None:
    _LOG.info("serving on %s", url(settings, listening.getsockname()[1]))


def uvicorn_config(app: Any, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for the application."""
    import uvicorn

    from turbo_tvm.server.connection import TimedConnection

    return uvicorn.Config(
        app,
        http=TimedConnection,
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        backlog=2048,
        ssl_certfile=None if settings.tls_cert is None else str(settings.tls_cert),
        ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
    )


def bind(settings: Settings) -> socket.socket:
    """Bind the socket that the server will listen on. Raises TurboError if the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((settings.host, settings.port))
    except OSError as error:
        made.close()
        where = f"{settings.host}:{settings.port}"
        raise TurboError(f"cannot listen on {where} ({error.strerror}): use another --port or --host") from error
    made.set_inheritable(True)
    return made
