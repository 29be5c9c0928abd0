"""Tuning through TVM's RPC tracker on loopback, with a server that is killed and started again on the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from tvm import rpc

import turbo_tvm
from turbo_tvm.errors import TuningError
from turbo_tvm.tuning import bench, tuner
from turbo_tvm.tuning.rpc_server import serve

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tuner")]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen]:
    """A process with its children: all of them are gone at the end."""
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield running
    finally:
        kill(running)


def kill(running: subprocess.Popen) -> None:
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def server(tracker: str, port: int):
    command = ("-m", "turbo_tvm", "tune-server", "--tracker", tracker, "--key", "box", "--host", "127.0.0.1")
    return process(sys.executable, *command, "--port", str(port))


def test_a_server_that_is_killed_costs_nothing(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FINAL_SECONDS", 0.01)
    monkeypatch.setattr(bench, "TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(tuner, "ROUND", 4)
    port = free_port()
    tracker = f"127.0.0.1:{port}"
    notes: list[str] = []
    with process(
        sys.executable, "-m", "tvm.exec.rpc_tracker", "--host=127.0.0.1", f"--port={port}", f"--port-end={port + 1}"
    ):
        wait_for(port)
        with server(tracker, free_port()) as first:
            restarted: list[threading.Thread] = []
            done = threading.Event()

            def start_again() -> None:
                time.sleep(3)
                with server(tracker, free_port()):
                    done.wait(300)

            def show(progress):
                notes.append(progress.note)
                if progress.done == 4 and not restarted:
                    kill(first)
                    restarted.append(threading.Thread(target=start_again))
                    restarted[0].start()

            try:
                report = turbo_tvm.tune(
                    *(tiny_artifact,),
                    **{"logs": tmp_path, "trials": 12, "kernels": ["linear_32x64"], "lengths": (8, 16), "threads": 1},
                    **{"tracker": tracker, "key": "box", "timeout_s": 30, "show": show},
                )
            finally:
                done.set()
                for thread in restarted:
                    thread.join()
    (one,) = report.kernels
    assert (one.trials, one.failed) == (12, 0)
    assert any(note.startswith("waiting for 'box' behind the tracker") for note in notes)


def test_sessions_that_are_killed_are_followed_by_others(tmp_path):
    port = free_port()
    with process(
        sys.executable, "-m", "tvm.exec.rpc_tracker", "--host=127.0.0.1", f"--port={port}", f"--port-end={port + 1}"
    ):
        wait_for(port)
        with server(f"127.0.0.1:{port}", free_port()) as running:
            tracker = rpc.connect_tracker("127.0.0.1", port)
            for _ in range(3):
                session = ask(tracker)
                assert session.cpu(0).exist
                for child in psutil.Process(running.pid).children(recursive=True):
                    child.kill()
                with pytest.raises(Exception, match=r"reset|closed|Shutdown"):
                    session.cpu(0).sync()
                    session.get_function("runtime.nothing")
                del session
            assert ask(tracker).cpu(0).exist


def ask(tracker):
    """A session, as soon as there is one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return tracker.request("box", session_timeout=60, max_retry=1)
        except RuntimeError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_machine_that_never_comes_is_an_error(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_RECONNECT_TIMEOUT_S", 1.0)
    with pytest.raises(TuningError, match=r"no machine 'box' behind the tracker 127.0.0.1:9 answers .* tune again"):
        turbo_tvm.tune(
            tiny_artifact,
            logs=tmp_path,
            trials=1,
            kernels=["linear_32x64"],
            tracker="127.0.0.1:9",
            key="box",
            timeout_s=20,
        )


@pytest.mark.parametrize("tracker", ["box", "box:", "box:x", ":1"])
def test_a_tracker_is_an_address(tracker):
    with pytest.raises(TuningError, match="is not 'host:port'"):
        serve(tracker, "key", "127.0.0.1", 1, print)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the tracker did not start")
