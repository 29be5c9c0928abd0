"""Bodies, in one part and in several, too large, too slow, and cut off."""

from __future__ import annotations

import asyncio
import zlib

import pytest

from turbo_tvm.server import errors, request_body
from turbo_tvm.server.errors import Disconnected, Problem
from turbo_tvm.server.request_body import read_body

GONE = {"type": "http.disconnect"}


def part(body: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


def read(*messages: dict, limit: int = 10, headers: dict[bytes, bytes] | None = None) -> bytes:
    waiting = list(messages)

    async def receive():
        if not waiting:
            await asyncio.sleep(600)
        return waiting.pop(0)

    return asyncio.run(read_body(headers or {}, receive, limit))


@pytest.mark.parametrize("parts", [[b""], [b"0123456789"], [b"01", b"", b"23"], [b"", b"0123456789"]])
def test_a_body_is_its_parts(parts):
    assert read(*(part(one, more=i < len(parts) - 1) for i, one in enumerate(parts))) == b"".join(parts)


@pytest.mark.parametrize(
    ("messages", "headers"),
    [
        ([part(b"0123456789a")], {}),
        ([part(b"0123456789", more=True), part(b"a", more=True)], {}),
        ([part(b"")], {b"content-length": b"11"}),
        ([part(b"")], {b"content-length": b"9" * 5000}),
    ],
)
def test_too_large(messages, headers):
    with pytest.raises(Problem, match="larger than 10 bytes") as caught:
        read(*messages, headers=headers)
    assert caught.value.kind is errors.TOO_LARGE


def test_too_slow(monkeypatch):
    monkeypatch.setattr(request_body, "BODY_S", 0.01)
    with pytest.raises(Problem, match="did not arrive") as caught:
        read(part(b"a", more=True))
    assert caught.value.kind is errors.SLOW_BODY


@pytest.mark.parametrize("messages", [[GONE], [part(b"a", more=True), GONE]])
def test_a_client_that_hangs_up(messages):
    with pytest.raises(Disconnected):
        read(*messages)


def compressed(body: bytes, form: str) -> bytes:
    stream = zlib.compressobj(wbits=zlib.MAX_WBITS | 16 if form == "gzip" else zlib.MAX_WBITS)
    return stream.compress(body) + stream.flush()


@pytest.mark.parametrize("form", ["gzip", "deflate"])
def test_compressed_bodies(form):
    headers = {b"content-encoding": form.encode()}
    whole = compressed(b"0123456789", form)
    assert read(part(whole), headers=headers, limit=100) == b"0123456789"
    halves = part(whole[:5], more=True), part(whole[5:])
    assert read(*halves, headers=headers, limit=100) == b"0123456789"
    for body, kind in (
        (compressed(b"0" * 1_000_000, form), errors.TOO_LARGE),  # a thousand bytes
        (whole[:-1], errors.INVALID),
        (whole + b"1", errors.INVALID),
        (b"{}", errors.INVALID),
        (b"", errors.INVALID),
    ):
        with pytest.raises(Problem) as caught:
            read(part(body), headers=headers, limit=10_000)
        assert caught.value.kind is kind


def test_other_encodings_are_refused_before_the_body_is_read():
    with pytest.raises(Problem, match="or in gzip or deflate, not in 'br'") as caught:
        read(headers={b"content-encoding": b"br"})
    assert caught.value.kind is errors.UNSUPPORTED
    assert read(part(b"a"), headers={b"content-encoding": b"identity"}) == b"a"
