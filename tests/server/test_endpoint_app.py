"""What every endpoint shares: limits with their statuses, keys, request ids, clients that leave, forms of errors."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from typing import ClassVar

import grpc
import httpx
import numpy as np
import pytest
from running_server import exact, running

pytestmark = pytest.mark.xdist_group("server")

ASK = {"model": "fake", "input": [1, 2, 3]}


@pytest.fixture
def served(fake):
    with running({"fake": fake}, max_queue=2, max_inputs=4, max_body_bytes=2000, timeout_s=20.0) as server:
        yield server


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served.url, timeout=30) as made:
        yield made


def in_background(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    return thread, found


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestStatuses:
    """Each in the form of the protocol."""

    FORMS: ClassVar = {
        "/v1/embeddings": lambda body: body["error"]["message"],
        "/embed": lambda body: body["error"] if body["error_type"] else None,
        "/v2/models/fake/infer": lambda body: body["error"],
    }

    @pytest.mark.parametrize("path", FORMS)
    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b"", 400),
            (b"{", 400),
            (b'{"id": "\xff\xfe", "model": "\xff", "inputs": "\xff"}', 400),
            (b'{"x": ' + b"[" * 1500, 400),
            (b"[]", 422),
            (b"{}", 422),
            (b"x" * 3000, 413),
        ],
        ids=["empty", "cut", "no UTF-8", "deep", "list", "nothing", "large"],
    )
    def test_bad_bodies(self, client, path, body, status):
        reply = client.post(path, content=body)
        assert reply.status_code == status
        assert self.FORMS[path](reply.json())

    def test_deep_json_within_a_value_of_any_kind(self, fake):
        with running({"fake": fake}) as server:
            for depth in (100, 10_000, 1_000_000):
                nested = "[" * depth + "]" * depth
                tensor = '{"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": ' + nested + "}"
                for path, value in (("/v2/models/fake/infer", f"[{tensor}]"), ("/", nested)):
                    text = '{"inputs": ' + value + "}"
                    assert httpx.post(server.url + path, content=text).status_code in (400, 422)

    def test_a_large_body_without_a_length(self, client):
        reply = client.post("/embed", content=(b"x" * 900 for _ in range(5)))
        assert reply.status_code == 413

    def test_a_body_in_parts(self, client):
        text = json.dumps({"inputs": [[1, 2], [3]]}).encode()
        reply = client.post("/embed", content=(text[i : i + 5] for i in range(0, len(text), 5)))
        assert reply.status_code == 200 and len(reply.json()) == 2

    def test_paths_and_methods(self, client):
        for path, form in (("/v1/x", "message"), ("/v2/x", ""), ("/x", "")):
            reply = client.get(path)
            assert reply.status_code == 404
            error = reply.json()["error"]
            assert "/openapi.json" in (error["message"] if form else error)
        reply = client.get("/embed")
        assert reply.status_code == 405 and reply.headers["allow"] == "POST"
        assert client.get("/v1/models/nobody").json()["error"]["code"] == 404
        assert client.post("/models/nobody/embed", json={"inputs": [1]}).status_code == 404

    def test_too_many_inputs(self, client):
        assert client.post("/embed", json={"inputs": [[1]] * 5}).status_code == 413
        body = {"model": "fake", "input": [[1]] * 5}
        assert client.post("/v1/embeddings", json=body).status_code == 413
        tensor = {"name": "input_ids", "shape": [5, 1], "datatype": "INT64", "data": [1] * 5}
        assert client.post("/v2/models/fake/infer", json={"inputs": [tensor]}).status_code == 413

    def test_a_matrix_that_is_wider_than_the_model(self, fake):
        ids = {"name": "input_ids", "shape": [1, 513], "datatype": "INT64", "data": [1] * 513}
        mask = {"name": "attention_mask", "shape": [1, 513], "datatype": "INT64", "data": [1] + [0] * 512}
        with running({"fake": fake}) as server:
            reply = httpx.post(f"{server.url}/v2/models/fake/infer", json={"inputs": [ids, mask]})
        assert reply.status_code == 400 and "513 wide" in reply.json()["error"]

    def test_an_answer_that_is_too_large(self, fake, monkeypatch):
        monkeypatch.setattr("turbo_tvm.server.model_service._MOST_VALUES", 5)
        with running({"fake": fake}) as server:
            assert httpx.post(f"{server.url}/embed", json={"inputs": [[1], [2]]}).status_code == 200
            reply = httpx.post(f"{server.url}/embed", json={"inputs": [[1], [2], [3]]})
            assert reply.status_code == 413 and "6 values" in reply.json()["error"]

    def test_other_kinds_of_inputs_are_no_failures(self, client):
        text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
        assert client.post("/v2/models/fake/infer", json={"inputs": [text]}).status_code == 422

    def test_a_text_for_a_model_without_tokenizer(self, client):
        reply = client.post("/embed", json={"inputs": "a"})
        assert reply.status_code == 422 and "no tokenizer" in reply.json()["error"]

    def test_a_model_that_fails(self, fake, client):
        fake.fail = lambda: ValueError("by chance")
        reply = client.post("/embed", json={"inputs": [1]})
        assert reply.status_code == 500 and reply.json()["error_type"] == "Backend"
        assert "by chance" not in reply.text  # what the log is for
        fake.fail = lambda: None
        exact(client.post("/v1/embeddings", json=ASK).json()["data"][0]["embedding"], [6, 3])


class TestLoad:
    def test_a_full_queue(self, fake, served, client):
        fake.gate.clear()
        running_now = in_background(lambda: client.post("/v1/embeddings", json=ASK))
        assert fake.entered.acquire(timeout=60)
        waiting = [in_background(lambda i=i: client.post("/v1/embeddings", json={**ASK, "input": [i]})) for i in (7, 8)]
        until(lambda: served.context.repository.get("fake").engine.waiting == 2)
        refused = client.post("/embed", json={"inputs": [9]})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error_type"] == "Overloaded"
        fake.gate.set()
        for thread, found in (running_now, *waiting):
            thread.join(60)
            assert found[0].status_code == 200
        metrics = client.get("/metrics").text
        assert 'turbo_requests_total{outcome="rejected",protocol="tei"} 1.0' in metrics

    def test_a_request_that_is_larger_than_the_queue_goes_in_as_it_has_room(self, fake, client):
        fake.seconds = 0.02
        exact(client.post("/embed", json={"inputs": [[7], [8], [9], [10]], "normalize": False}).json()[3], [10, 1])

    def test_one_of_several_that_never_fits_cancels_the_others(self, fake, served, client):
        model = served.context.repository.get("fake")
        fake.gate.clear()
        thread, found = in_background(lambda: client.post("/v1/embeddings", json=ASK))
        assert fake.entered.acquire(timeout=60)
        served.context.settings = replace(served.context.settings, timeout_s=0.3)
        assert client.post("/embed", json={"inputs": [[7], [8], [9]]}).status_code == 504
        assert model.engine.waiting == 0
        fake.gate.set()
        thread.join(60)
        assert found[0].status_code == 200

    def test_texts_that_wait_for_the_tokenizer_are_bounded_too(self, artifacts):
        with running([artifacts["embedder"]], threads=1, max_queue=2) as server:
            model, gate, entered = server.context.repository.get("embedder"), threading.Event(), threading.Event()
            tokens = model.tokenization._requests

            def slowly(texts, options):
                entered.set()
                assert gate.wait(30)
                return tokens(texts, options)

            model.tokenization._requests = slowly

            def ask(text):
                body = {"inputs": f"{text} " * 200, "truncate": True}  # short ones do not wait
                return httpx.post(f"{server.url}/embed", json=body, timeout=30)

            begun = in_background(lambda: ask("the cat"))
            assert entered.wait(60)
            second = in_background(lambda: ask("a dog"))
            until(lambda: model.tokenization.waiting == 2)
            refused = ask("red")
            assert refused.status_code == 429 and "tokenizer" in refused.json()["error"]
            gate.set()
            for thread, found in (begun, second):
                thread.join(60)
                assert found[0].status_code == 200
            until(lambda: model.tokenization.waiting == 0)
            assert ask("red").status_code == 200

    def test_time(self, fake):
        with running({"fake": fake}, timeout_s=0.2) as server:
            fake.gate.clear()
            reply = httpx.post(f"{server.url}/v1/embeddings", json=ASK)
            assert reply.status_code == 504 and "0.2 s" in reply.json()["error"]["message"]
            fake.gate.set()

    @pytest.mark.parametrize("path", ["/embed", "/v2/models/embedder/infer"])
    def test_the_time_for_the_tokenizer_is_part_of_the_time_for_the_answer(self, artifacts, path):
        with running([artifacts["embedder"]], threads=1, timeout_s=20.0) as server:
            model, given = server.context.repository.get("embedder"), []
            tokens, submit = model.tokenization._requests, model.engine.submit

            def slowly(texts, options):
                time.sleep(0.5)
                return tokens(texts, options)

            def noting(*args, timeout_s, **options):
                given.append(timeout_s)
                return submit(*args, timeout_s=timeout_s, **options)

            model.tokenization._requests, model.engine.submit = slowly, noting
            text = "the cat " * 200
            tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
            body = {"inputs": [tensor] if "v2" in path else text, "truncate": True, "parameters": {"truncate": True}}
            assert httpx.post(f"{server.url}{path}", json=body, timeout=30).status_code == 200
        assert 10 < given[0] <= 19.5

    def test_time_and_priority_of_a_kserve_request(self, fake, client):
        fake.gate.clear()
        tensor = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}
        body = {"inputs": [tensor], "parameters": {"timeout": 100_000, "priority": 1}}
        assert client.post("/v2/models/fake/infer", json=body).status_code == 504
        fake.gate.set()
        for wrong in ({"timeout": -1}, {"priority": "high"}, {"timeout": 1.5}, {"priority": 2**70}):
            assert client.post("/v2/models/fake/infer", json={**body, "parameters": wrong}).status_code == 400

    def test_who_leaves_cancels(self, fake, served, client):
        fake.gate.clear()
        thread, _ = in_background(lambda: client.post("/v1/embeddings", json=ASK))
        assert fake.entered.acquire(timeout=60)
        engine = served.context.repository.get("fake").engine
        with socket.create_connection(("127.0.0.1", served.port)) as leaving:
            body = json.dumps({"inputs": [5]}).encode()
            leaving.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            until(lambda: engine.waiting == 1)
        until(lambda: engine.waiting == 0)
        assert engine.statistics.cancelled == 1
        fake.gate.set()
        thread.join(60)
        assert fake.seen == [(1, 2, 3)]
        until(lambda: 'outcome="cancelled",protocol="tei"} 1.0' in client.get("/metrics").text)


class TestKeys:
    def test_keys(self, fake):
        with running({"fake": fake}, api_keys=("one", "two")) as server, httpx.Client(base_url=server.url) as client:
            for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "one"}, {"api-key": ""}):
                for path, form in (("/v1/embeddings", "authentication_error"), ("/embed", "Unauthorized")):
                    reply = client.post(path, json=ASK, headers=headers)
                    assert reply.status_code == 401 and form in reply.text
                    assert reply.headers["www-authenticate"] == "Bearer"
            for headers in ({"authorization": "Bearer one"}, {"Authorization": "bearer two"}, {"api-key": "one"}):
                assert client.post("/v1/embeddings", json=ASK, headers=headers).status_code == 200
            assert client.get("/health").status_code == 200  # a load balancer has no key
            assert client.get("/v2/health/ready").status_code == 200
            assert client.get("/metrics").status_code == 401

    def test_keys_of_grpc(self, fake):
        import tritonclient.grpc as triton

        with running({"fake": fake}, api_keys=("one",)) as server:
            client = triton.InferenceServerClient(server.grpc)
            assert client.is_server_live()
            ids = triton.InferInput("input_ids", [1, 2], "INT64")
            ids.set_data_from_numpy(np.array([[3, 4]]))
            with pytest.raises(triton.InferenceServerException, match="key"):
                client.infer("fake", [ids])
            answer = client.infer("fake", [ids], headers={"authorization": "Bearer one"})
            exact(answer.as_numpy("embedding"), [[7, 2]])
            client.close()

    @pytest.mark.parametrize(
        ("keys", "metadata", "status", "text"),
        [
            ((), (), "INVALID_ARGUMENT", "no ModelInferRequest"),
            (("one",), (), "UNAUTHENTICATED", "key"),  # whoever has no key makes nobody parse
            (("one",), (("authorization", "Bearer one"),), "INVALID_ARGUMENT", "no ModelInferRequest"),
        ],
    )
    def test_noise_over_grpc(self, fake, keys, metadata, status, text):
        with running({"fake": fake}, api_keys=keys) as server, grpc.insecure_channel(server.grpc) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff\xff\xff", metadata=metadata, timeout=60)
        assert caught.value.code().name == status and text in caught.value.details()


def _has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no ::1")
def test_ipv6(fake):
    with running({"fake": fake}, host="::1") as server, grpc.insecure_channel(server.grpc) as channel:
        assert httpx.post(f"{server.url}/embed", json={"inputs": [3, 4], "normalize": False}).json() == [[7.0, 2.0]]
        assert channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=60) == b"\x08\x01"


class TestHeaders:
    @pytest.mark.parametrize(
        ("given", "kept"), [("abc-1", True), ("", False), ("x" * 200, False), ("a\tb", False)], ids=str
    )
    def test_request_ids(self, client, given, kept):
        found = client.get("/v2", headers={"x-request-id": given}).headers["x-request-id"]
        assert (found == given) if kept else (len(found) == 16 and found != given)

    def test_cors(self, fake):
        with running({"fake": fake}, cors_origins=("https://page.example",)) as server:
            headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
            reply = httpx.options(f"{server.url}/embed", headers=headers)
            assert reply.headers["access-control-allow-origin"] == "https://page.example"
            reply = httpx.get(f"{server.url}/v2", headers={"origin": "https://other.example"})
            assert "access-control-allow-origin" not in reply.headers


class TestRudeClients:
    """Raw bytes: the server stays up, and answers the next one."""

    @pytest.mark.parametrize(
        "sent",
        [
            b"\x00\x01\x02\x03\r\n\r\n",
            b"POST /embed HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
            b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            b"POST /embed HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{",  # and nothing more
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
            b"POST /v2/models/fake/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: 9x\r\n"
            b"content-length: 2\r\n\r\n{}",
        ],
        ids=["noise", "huge length", "negative", "bad chunk", "half a body", "long path", "bad header length"],
    )
    @pytest.mark.parametrize("half", [False, True], ids=["closed", "half-closed"])
    def test_nothing_breaks(self, served, client, sent, half):
        with socket.create_connection(("127.0.0.1", served.port)) as rude:
            rude.sendall(sent)
            if half:
                rude.shutdown(socket.SHUT_WR)
            rude.settimeout(0.3)
            try:
                reply = rude.recv(100)
            except (TimeoutError, ConnectionResetError):
                reply = b""
        assert not reply.startswith(b"HTTP/1.1 5")
        assert client.post("/v1/embeddings", json=ASK).status_code == 200


class TestTls:
    def test_tls(self, fake, tmp_path):
        import subprocess

        key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
        subprocess.run(
            f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
            f" -keyout {key} -out {cert}",
            shell=True,
            check=True,
            capture_output=True,
        )
        with running({"fake": fake}, tls_cert=cert, tls_key=key) as server:
            import ssl

            reply = httpx.post(
                f"{server.url}/v1/embeddings", json=ASK, verify=ssl.create_default_context(cafile=str(cert))
            )
            assert reply.status_code == 200
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{server.url}/v2".replace("https", "http"))
