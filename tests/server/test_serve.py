"""`turbo-tvm serve` as a process: signals, workers, ports, files."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from cli_runner import fail
from running_server import exact, scraped

import turbo_tvm

pytestmark = pytest.mark.xdist_group("server")

ASK = {"inputs": ["the cat sat", "red"]}


class Process:
    """The command, with its log as it comes."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "turbo_tvm", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def log(self):
        return "".join(self.lines)

    def url(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = re.search(r"serving on (http://[\d.:]+)", self.log)
            if found:
                try:
                    if httpx.get(f"{found[1]}/health", timeout=30).status_code == 200:
                        return found[1]
                except httpx.TransportError:
                    pass
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(self.log)

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        status = self.process.wait(60)
        self._reader.join(60)
        return status


@contextmanager
def process(*arguments):
    made = Process(*arguments)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_it_stops_with_status_0_when_what_was_accepted_is_answered(artifacts, how):
    with process(artifacts["embedder"], "--json-logs", "--cache-mb", 0) as served:
        url, found = served.url(), []
        local = turbo_tvm.load(artifacts["embedder"], threads=1).encode(ASK["inputs"] * 500)

        def ask():
            found.append(httpx.post(f"{url}/embed", json={"inputs": ASK["inputs"] * 500}, timeout=30))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        assert served.stop(how) == 0, served.log
        for thread in threads:
            thread.join(30)
        answered = [reply for reply in found if reply.status_code == 200]
        for reply in answered:
            exact(reply.json(), local)
        assert all(line.startswith("{") for line in served.lines)
        assert "Traceback" not in served.log and '"status": 500' not in served.log


def test_workers_share_a_port_and_count_together(artifacts):
    with process(artifacts["embedder"], "--workers", 2, "--cache-mb", 0) as served:
        url = served.url()
        local = turbo_tvm.load(artifacts["embedder"], threads=1).encode(ASK["inputs"])
        pids = set()
        deadline = time.monotonic() + 60
        asked = 0
        while len(pids) < 2 and time.monotonic() < deadline:  # each by a connection of its own
            pids.add(httpx.get(f"{url}/dashboard/state").json()["pid"])
            reply = httpx.post(f"{url}/embed", json=ASK)
            exact(reply.json(), local)
            asked += 1
        assert len(pids) == 2
        found = scraped(url)
        assert found["turbo_requests_total", ("outcome", "answered"), ("protocol", "tei")] == asked  # without /health
        assert found["turbo_batch_sequences_sum", ("model", "embedder")] == 2 * asked
        assert served.stop() == 0


def test_what_a_worker_held_goes_with_it_and_what_it_counted_stays(artifacts):
    with process(artifacts["embedder"], "--workers", 2, "--cache-mb", 0) as served:
        url = served.url()
        asked, held, workers = 0, 0.0, set()
        deadline = time.monotonic() + 60
        while len(workers) < 2 or held == 0:  # both hold memory for what they have answered
            assert time.monotonic() < deadline
            with httpx.Client(base_url=url) as client:  # one connection: one worker
                assert client.post("/embed", json=ASK).status_code == 200
                asked += 1
                workers.add(client.get("/dashboard/state").json()["pid"])
                if len(workers) == 2:
                    time.sleep(1.1)  # both have said what they hold
                    held = scraped(url)["turbo_arena_bytes", ("model", "embedder")]
        os.kill(min(workers), signal.SIGKILL)
        while True:
            assert time.monotonic() < deadline
            try:
                found = scraped(url)
            except httpx.TransportError:  # the connection was that worker's
                continue
            if found["turbo_arena_bytes", ("model", "embedder")] == held / 2:
                break
            time.sleep(0.1)
        assert found["turbo_requests_total", ("outcome", "answered"), ("protocol", "tei")] == asked
        assert served.stop() == 0


def test_workers_that_cannot_start_end_the_command(artifacts):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(artifacts["embedder"], "--workers", 2, "--grpc-port", port) as served:
            assert served.process.wait(60) == 1
            served._reader.join(60)
    assert f"gRPC cannot listen on 127.0.0.1:{port}" in served.log


def test_a_port_that_is_taken(artifacts):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "turbo_tvm", "serve", artifacts["embedder"], "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_files_that_cannot_be_served(tmp_path, artifacts):
    broken = tmp_path / "broken.turbo"
    broken.write_bytes(artifacts["embedder"].read_bytes()[:-100])
    for arguments, words in (
        ([tmp_path / "none.turbo"], "there is no file"),
        ([broken], "cannot use"),
        ([broken, "--workers", "2"], "cannot use"),
    ):
        command = [sys.executable, "-m", "turbo_tvm", "serve", *map(str, arguments), "--port", "0"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--api-key", ""], "is empty"),
        (["--api-key", " one"], "blanks"),
        (["--grpc-port", "0", "--workers", "2"], "share a gRPC port"),
        (["--tls-cert", "cert.pem"], "both --tls-cert and --tls-key"),
    ],
    ids=str,
)
def test_options_that_cannot_be(artifacts, options, words):
    assert words in fail("serve", artifacts["embedder"], *options, code=2)


def test_tls_files_that_are_not_there(artifacts, tmp_path):
    options = ("--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem")
    assert "for TLS" in fail("serve", artifacts["embedder"], *options)
