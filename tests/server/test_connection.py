"""Clients that are too slow are hung up on, and nothing of them is left."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from contextlib import ExitStack

import httpx
import numpy as np
import psutil
import pytest
from running_server import exact, running

from turbo_tvm.server import connection

pytestmark = pytest.mark.xdist_group("server")

ASK = {"model": "fake", "input": [1, 2, 3]}
HEAD = b"POST /embed HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def served(fake):
    with running({"fake": fake}, max_body_bytes=4 << 20) as server:
        assert httpx.post(f"{server.url}/v1/embeddings", json=ASK).status_code == 200
        yield server


@pytest.fixture
def impatient(monkeypatch):
    for name in ("HEAD_S", "BODY_S", "READ_S"):
        monkeypatch.setattr(connection, name, 0.4)


@pytest.fixture
def patient(monkeypatch):
    """Limits that a loaded machine does not reach by itself."""
    for name in ("HEAD_S", "BODY_S", "READ_S"):
        monkeypatch.setattr(connection, name, 2.0)


def open_sockets(server):
    """Of the server's side, and requests that it works on."""
    return len(server.server.server_state.connections), len(server.server.server_state.tasks)


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def closed(one):
    """Whether the other side hangs up, whatever it says before."""
    one.settimeout(60)
    try:
        while one.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


OFFERS = {
    "h2c, as Java's client": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQ\r\n",
    "TLS, as Apache's client": b"Connection: upgrade\r\nUpgrade: TLS/1.2\r\n",
    "a web socket": b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n",
    "without saying so in Connection": b"upgrade: h2c\r\n",
}


def posted(offer, body, chunked=False):
    """A request with that offer."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + offer
    if chunked:
        return head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return head + b"content-length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("pieces", ["at once", "head and body", "byte by byte"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=list(OFFERS))
def test_requests_that_offer_another_protocol_are_answered(served, offer, chunked, pieces):
    """Two on one connection, and one that offers nothing."""
    body = json.dumps(ASK).encode()
    whole = posted(offer, body, chunked)
    end = whole.index(b"\r\n\r\n") + 4
    cuts = {
        "at once": [whole],
        "head and body": [whole[:end], whole[end:]],
        "byte by byte": [bytes([b]) for b in whole],
    }
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(60)
        for parts in (cuts[pieces], cuts[pieces], [posted(b"", body)]):
            for part in parts:
                client.sendall(part)
            answer = client.makefile("rb")
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            length = next(int(line.split(b":")[1]) for line in answer if line.lower().startswith(b"content-length"))
            while answer.readline() != b"\r\n":
                pass
            assert json.loads(answer.read(length))["data"]


def test_many_offers_at_once(served):
    """Each is parsed again, one after the other."""
    ask = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(60)
        client.sendall(ask * 400)
        got = b""
        while got.count(b"HTTP/1.1 200") < 400:
            part = client.recv(1 << 16)
            assert part
            got += part


STARTS = {
    "nothing": b"",
    "a byte": b"P",
    "half": HEAD,
    "more": HEAD + b"x-more: 1\r\n",
    "no body": HEAD + b"content-length: 50\r\n\r\n",
    "a line after an answer": b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n\r\n",
    "a body after an answer": b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n1",
}


@pytest.mark.parametrize("begun", STARTS.values(), ids=list(STARTS))
def test_a_request_that_never_ends(impatient, served, begun):
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(begun)
        until(lambda: open_sockets(served)[0] == 1)
        time.sleep(0.1)
        slow.sendall(b"\r\n" if begun.startswith(b"GET") else b"")
        assert closed(slow)
    until(lambda: open_sockets(served) == (0, 0))


def test_a_second_head_on_a_kept_connection(impatient, served):
    body = json.dumps({"inputs": [1, 2]}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        assert slow.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(0.6)  # unused, it is kept
        slow.sendall(HEAD)
        assert closed(slow)
    until(lambda: open_sockets(served) == (0, 0))


def test_an_answer_that_nobody_reads(impatient, served, fake):
    fake.right = lambda ids: np.zeros(400_000, np.float32)
    body = json.dumps({"inputs": [[1, i] for i in range(40)], "normalize": False}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: len(fake.seen) > 39)
        until(lambda: open_sockets(served) == (0, 0))


def test_a_slow_reader_that_reads(patient, served, fake):
    fake.right = lambda ids: np.zeros(400_000, np.float32)
    body = json.dumps({"inputs": [[1, i] for i in range(8)], "normalize": False}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        got, pauses, pause_s = 0, 0, 0.04
        slow.settimeout(60)
        while got <= 12_000_000 and (part := slow.recv(1 << 17)):
            got, pauses = got + len(part), pauses + 1
            time.sleep(pause_s)
        assert got > 12_000_000 and pauses * pause_s > 1.5 * connection.READ_S, "it took longer than one pause may"


def test_a_head_that_is_too_large(served):
    for head in (b"GET /health HTTP/1.1\r\nx: " + b"a" * (1 << 20), b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 50_000):
        with socket.create_connection(("127.0.0.1", served.port)) as rude:
            try:
                rude.sendall(head)
                assert closed(rude)
            except (ConnectionResetError, BrokenPipeError):
                pass
        until(lambda: open_sockets(served) == (0, 0))
    many = {f"x-{i}": "a" * 100 for i in range(100)}
    assert httpx.get(f"{served.url}/health", headers=many).status_code == 200


def test_a_slow_one_that_makes_it(patient, served):
    body = json.dumps({"inputs": [1, 2], "normalize": False}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(HEAD)
        time.sleep(0.2)
        slow.sendall(b"content-length: %d\r\n\r\n" % len(body))
        slow.sendall(body)
        answer = b""
        while not answer.endswith(b"]]"):
            answer += slow.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        exact(json.loads(answer.partition(b"\r\n\r\n")[2]), [[3, 2]])


def test_nothing_is_left_of_hundreds(served):
    def tasks():
        gc.collect()
        return sum(isinstance(one, asyncio.Task) and not one.done() for one in gc.get_objects())

    process = psutil.Process()
    before = process.num_fds(), tasks(), process.num_threads()
    endings = (b"", b"content-length: 50\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n5\r\nab", b"\x00\r\n\r\n")
    for _ in range(5):
        with ExitStack() as stack:
            for number in range(100):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
                one.sendall(HEAD + endings[number % len(endings)])
                if number % 3 == 0:
                    one.shutdown(socket.SHUT_WR)
            assert httpx.post(f"{served.url}/v1/embeddings", json=ASK).status_code == 200
    until(lambda: open_sockets(served) == (0, 0))
    until(lambda: process.num_fds() <= before[0])
    assert tasks() <= before[1] and process.num_threads() <= before[2]
