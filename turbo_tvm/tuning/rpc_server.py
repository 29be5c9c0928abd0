"""A machine that tuners may use: TVM's RPC server, ready for our kernels, at a tracker."""

from __future__ import annotations

from turbo_tvm.errors import TuningError, summary


def serve(tracker: str, key: str, host: str, port: int) -> None:
    """Offer this machine at `tracker`, "host:port", under a key, until the process is interrupted.

    Whoever reaches the port can run code here: use it in a network that you trust. TuningError where it cannot start.
    """
    from tvm import rpc

    name, _, number = tracker.rpartition(":")
    if not name or not number.isdecimal():
        raise TuningError(f"tracker {tracker!r} is not 'host:port', such as '10.0.0.5:9190'")
    try:
        server = rpc.Server(
            host,
            port,
            port + 10,
            key=key,
            tracker_addr=(name, int(number)),
            silent=True,
            server_init_callback=_prepare,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise TuningError(f"the RPC server cannot start on {host}:{port}: {summary(error)}") from error
    try:
        server.proc.join()
    finally:
        server.terminate()


def _prepare() -> None:
    """In the server's process: what a process that runs our kernels does first."""
    from turbo_tvm import config, targets
    from turbo_tvm.runtime.cpu_features import request_amx

    config.let_tvm_use_every_core()
    request_amx(targets.describe("cpu", targets.resolve("cpu")))
