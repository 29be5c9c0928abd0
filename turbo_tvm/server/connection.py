"""uvicorn's HTTP connection with limits on slow clients, which answers requests that offer another protocol.

The limits are for heads that never end or are too large, for bodies that never begin, and for answers that nobody
reads. A body that comes slowly has its limit in `request_body`, an idle connection in uvicorn.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = (
    60.0  # from the connection, or a request's first byte, to the end of its head, as nginx's client_header_timeout
)
READ_S = 60.0  # within which a client must read some of a pending answer, as nginx's send_timeout
BODY_S = 90.0  # to wait for a body of which nothing comes; `request_body` answers one that comes slowly
HEAD_BYTES = 64 << 10  # the most of a request's first line and headers

_OFFER = (b"upgrade", b"http2-settings")  # headers, and what Connection says of them


class TimedConnection(HttpToolsProtocol):
    """A connection that hangs up on slow clients, which frees its memory and its file descriptor.

    A request may offer to go on in another protocol, as Java's client does with every one (Upgrade: h2c). The offer may
    be ignored, the request must be answered (RFC 9110, 7.8); the parser ends it at its head: its body would be lost.
    """

    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None
    _head_bytes: int | None = 0  # of a head that has not ended; None where none is awaited
    _unread = 0
    _data = b""  # that the parser has
    _left = b""  # that it is to have then

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._head = self._hang_up_after(HEAD_S)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head, and renew the time limit, which uvicorn cancels with any byte."""
        self._left = data
        while self._left and self.parser is not None:
            self._data, self._left = self._left, b""
            super().data_received(self._data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.transport.abort()
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.parser is not None and (self._head is None or self._head.cancelled()):
            self._head = self._hang_up_after(HEAD_S)

    def on_message_begin(self) -> None:
        """Begin to wait for the end of a head."""
        _stop(self._head)
        self._head, self._head_bytes = self._hang_up_after(HEAD_S), 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin to wait for a body, as the head is complete."""
        if self._has_offer():  # it is parsed again without
            return
        _stop(self._head)
        self._head, self._head_bytes = self._hang_up_after(BODY_S), None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop waiting, as the request is complete."""
        if self._has_offer():
            return
        _stop(self._head)
        super().on_message_complete()

    def _has_offer(self) -> bool:
        return self.parser.should_upgrade() and not self._should_upgrade()

    def _unsupported_upgrade_warning(self) -> None:
        """Let a request be parsed again without its offer, and what came after its head; uvicorn calls it then."""
        offer = sys.exc_info()[1]
        assert isinstance(offer, httptools.HttpParserUpgrade)
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in map(_without_offer, self.headers) if header[0] not in _OFFER]
        self.parser = httptools.HttpRequestParser(self)
        self._left = b"\r\n".join([*lines, b"", b""]) + self._data[offer.args[0] :]

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        _stop(self._answer)
        self._unread = self.transport.get_write_buffer_size()
        self._answer = self.loop.call_later(READ_S, self._hang_up_if_unread)
        super().pause_writing()

    def _hang_up_if_unread(self) -> None:
        """Hang up if the client has read nothing since the last look; else look again later."""
        left = self.transport.get_write_buffer_size()
        if left >= self._unread:
            self.transport.abort()
            return
        self._unread, self._answer = left, self.loop.call_later(READ_S, self._hang_up_if_unread)

    def resume_writing(self) -> None:
        """Stop waiting, as the client reads."""
        _stop(self._answer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting, as either side has hung up."""
        _stop(self._head)
        _stop(self._answer)
        super().connection_lost(exc)

    def _hang_up_after(self, seconds: float) -> asyncio.TimerHandle:
        transport: Any = self.transport
        return self.loop.call_later(seconds, transport.abort)


def _without_offer(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    name, value = header
    if name == b"connection":
        value = b", ".join(token for token in map(bytes.strip, value.split(b",")) if token.lower() not in _OFFER)
    return name, value


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
