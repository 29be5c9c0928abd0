"""The server on a local Ray cluster: two replicas, one of which is killed under load."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import pytest
from running_server import exact

import turbo_tvm
from turbo_tvm.errors import InputError
from turbo_tvm.server.ray_app import application, build
from turbo_tvm.server.settings import Settings

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.slow]

TEXTS = ["the cat sat on a mat", "red"]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ["RAY_DEDUP_LOGS"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def test_two_replicas_one_killed_under_load(cluster, artifacts):
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": 8377})
    settings = Settings(files=(artifacts["embedder"],), threads=1, cache_bytes=0, access_log=False)
    serve.run(application(settings, min_replicas=2, max_replicas=2, cpus=1))
    url = "http://127.0.0.1:8377"
    wanted = turbo_tvm.load(artifacts["embedder"], threads=1).encode(TEXTS)

    def pids(seconds=60):
        found, deadline = set(), time.monotonic() + seconds
        while len(found) < 2 and time.monotonic() < deadline:
            found.add(httpx.get(f"{url}/dashboard/state", timeout=30).json()["pid"])
        return found

    before = pids()
    assert len(before) == 2
    good, bad, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                reply = httpx.post(f"{url}/embed", json={"inputs": TEXTS}, timeout=30)
            except httpx.TransportError as error:
                bad.append(error)
                continue
            if reply.status_code == 200:
                exact(reply.json(), wanted)
                good.append(time.monotonic())
            else:
                bad.append(reply.status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    at = time.monotonic()
    time.sleep(8)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert sum(moment > at + 1 for moment in good) > 20, "the other replica goes on"
    assert len(bad) <= 8, bad  # what the killed one had in hand, and no more
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        now = pids(5)
        if len(now) == 2 and killed not in now:
            break
    else:
        raise AssertionError("the replica did not come back")
    serve.shutdown()


def test_arguments_that_are_wrong(artifacts):
    with pytest.raises(InputError, match="files="):
        build({"file": "a.turbo"})
    with pytest.raises(InputError, match="replicas"):
        application(Settings(files=()), min_replicas=3, max_replicas=2)
