"""TVM's RPC server, set up for our kernels and registered at a tracker, for tuners to measure on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from turbo_tvm.errors import TuningError, summary


def serve(tracker: str, key: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Offer this machine at `tracker`, "host:port", under a key, until the process is interrupted.

    A candidate that crashes ends the session's process, and with it the thread that accepts sessions: the server is
    then restarted. Whoever reaches the port can run code here: use it in a network that you trust.

    say: called with a line on each event. Raises TuningError where the server cannot start.
    """
    from tvm.rpc.server import PopenRPCServerState

    name, _, number = tracker.rpartition(":")
    if not name or not number.isdecimal():
        raise TuningError(f"tracker {tracker!r} is not 'host:port', such as '10.0.0.5:9190'")
    _prepare()
    options = {"tracker_addr": (name, int(number)), "key": key, "silent": True}
    threading.excepthook = lambda failed: say(f"a session ended: {failed.exc_value}")
    home = os.getcwd()
    while True:
        os.chdir(home)  # a session works in a directory of its own, which is removed with it
        try:
            state = PopenRPCServerState(host, port, port + 10, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise TuningError(f"the RPC server cannot start on {host}:{port}: {summary(error)}") from error
        say(f"listening on {host}:{state.port}")
        try:
            state.thread.join()
        except KeyboardInterrupt:
            os._exit(130)  # the thread waits for sessions and cannot be asked to end
        state.sock.close()
        say("starting again")


def _prepare() -> None:
    """Set up this process to run kernels; those of the sessions are forked from it."""
    from turbo_tvm import config
    from turbo_tvm.compiler import targets
    from turbo_tvm.runtime.device.cpu_features import request_amx

    config.let_tvm_use_every_core()
    request_amx(targets.describe("cpu", targets.resolve("cpu")))
