"""Reading a request's body, within a size and a time, compressed or not."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping

from turbo_tvm.server import errors
from turbo_tvm.server.asgi import Message, Receive
from turbo_tvm.server.errors import Disconnected, Problem

BODY_S = 60.0  # for a body to arrive

# Content-Encoding, and zlib's window: it finds out whether data are gzip's or zlib's own.
_COMPRESSED = {b"gzip": zlib.MAX_WBITS | 32, b"x-gzip": zlib.MAX_WBITS | 32, b"deflate": zlib.MAX_WBITS | 32}


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Return the whole body, decompressed, of at most `limit` bytes.

    Raises Problem for one that is larger or too slow, or compressed in another way than Content-Encoding says or than
    gzip and deflate; Disconnected if the client hangs up.
    """
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding not in (b"", b"identity", *_COMPRESSED):
        shown = encoding[:40].decode("latin-1")
        raise Problem(errors.UNSUPPORTED, f"bodies are taken as they are, or in gzip or deflate, not in {shown!r}")
    body = await _whole(headers, receive, limit)
    return _decompressed(body, encoding, limit) if encoding in _COMPRESSED else body


def _decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(_COMPRESSED[encoding])
    try:
        found = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise Problem(errors.INVALID, f"the body is not in {encoding.decode()}: {error}") from None
    if len(found) > limit:
        raise _too_large(limit)
    if not stream.eof or stream.unused_data:
        raise Problem(errors.INVALID, f"the body is not one whole stream in {encoding.decode()}")
    return found


async def _whole(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    message = await _received(receive)
    first = message.get("body", b"")
    if len(first) > limit:
        raise _too_large(limit)
    if not message.get("more_body"):
        return first
    try:
        return await asyncio.wait_for(_rest(first, receive, limit), BODY_S)
    except asyncio.TimeoutError:
        raise Problem(errors.SLOW_BODY, f"the body did not arrive within {BODY_S:.0f} s") from None


async def _rest(first: bytes, receive: Receive, limit: int) -> bytes:
    """Return a body that comes in several parts, of which this is the first."""
    parts, size, more = [first], len(first), True
    while more:
        message = await _received(receive)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _received(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message


def _too_large(limit: int) -> Problem:
    return Problem(errors.TOO_LARGE, f"the body is larger than {limit:,} bytes, the limit of this server")
