"""Models by name: several in one server, loaded and unloaded by API where that is allowed."""

from __future__ import annotations

import shutil
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from running_server import exact, running

import turbo_tvm

pytestmark = pytest.mark.xdist_group("server")


def test_without_a_directory_nothing_is_loaded(real):
    with httpx.Client(base_url=real.url) as client:
        for action in ("load", "unload"):
            reply = client.post(f"/v2/repository/models/embedder/{action}")
            assert reply.status_code == 405 and "--models-dir" in reply.json()["error"]
        found = client.post("/v2/repository/index").json()
        assert [(one["name"], one["state"]) for one in found] == [
            (name, "READY") for name in ("classifier", "embedder", "reranker")
        ]


def test_load_serve_unload(artifacts, tmp_path):
    shutil.copy(artifacts["classifier"], tmp_path / "extra.turbo")
    (tmp_path / "broken.turbo").write_bytes(b"nothing")
    with running([artifacts["embedder"]], models_dir=tmp_path, threads=1) as server:
        client = triton.InferenceServerClient(server.url.removeprefix("http://"))
        states = {one["name"]: one["state"] for one in client.get_model_repository_index()}
        assert states == {"broken": "UNAVAILABLE", "embedder": "READY", "extra": "UNAVAILABLE"}
        client.load_model("extra")
        text = triton.InferInput("text", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"a cat"], object))
        wanted = turbo_tvm.load(artifacts["classifier"], threads=1).encode(["a cat"])
        exact(client.infer("extra", [text]).as_numpy("logits"), wanted)
        client.load_model("extra")  # again: the file may have changed
        exact(client.infer("extra", [text]).as_numpy("logits"), wanted)
        client.unload_model("extra")
        assert not client.is_model_ready("extra")
        with pytest.raises(triton.InferenceServerException, match="no model 'extra'"):
            client.infer("extra", [text])
        for name, words in (("broken", "cannot use"), ("nobody", "no file"), ("../extra", "404")):
            with pytest.raises(triton.InferenceServerException, match=words):
                client.load_model(name)
        assert client.is_server_ready()
        client.unload_model("embedder")
        assert not client.is_server_ready()
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.post(f"{server.url}/embed", json={"inputs": "a"}).status_code == 503
        client.close()


def test_a_load_goes_on_when_who_asked_for_it_leaves(fake, tmp_path):
    (tmp_path / "late.turbo").touch()
    entered, gate = threading.Event(), threading.Event()

    def open_file(path, threads):
        if path.stem == "late":
            entered.set()
            assert gate.wait(30)
        return fake

    with running({"fake": fake}, open_file=open_file, models_dir=tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(b"POST /v2/repository/models/late/load HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            assert entered.wait(60)
        gate.set()
        deadline = time.monotonic() + 60
        while httpx.get(f"{server.url}/v2/models/late/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_two_files_of_one_name(artifacts, tmp_path):
    from turbo_tvm.errors import InputError
    from turbo_tvm.server.metrics import Metrics
    from turbo_tvm.server.repository import Repository
    from turbo_tvm.server.settings import Settings

    other = tmp_path / "embedder.turbo"
    shutil.copy(artifacts["embedder"], other)
    repository = Repository(Settings(files=(), threads=1), Metrics())
    repository.add(artifacts["embedder"])
    with pytest.raises(InputError, match="rename one"):
        repository.add(other)
    repository.close()
