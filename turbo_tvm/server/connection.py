"""uvicorn's HTTP connection with limits on slow clients.

They are for heads that never end or are too large, for bodies that never begin, and for answers that nobody reads. A
body that comes slowly has its limit in `request_body`, an idle connection in uvicorn.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = (
    60.0  # from the connection, or a request's first byte, to the end of its head, as nginx's client_header_timeout
)
READ_S = 60.0  # within which a client must read some of a pending answer, as nginx's send_timeout
BODY_S = 90.0  # to wait for a body of which nothing comes; `request_body` answers one that comes slowly
HEAD_BYTES = 64 << 10  # the most of a request's first line and headers


class TimedConnection(HttpToolsProtocol):
    """A connection that hangs up on slow clients, which frees its memory and its file descriptor."""

    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None
    _head_bytes: int | None = 0  # of a head that has not ended; None where none is awaited
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._head = self._hang_up_after(HEAD_S)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head, and renew the time limit, which uvicorn cancels with any byte."""
        super().data_received(data)
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
        _stop(self._head)
        self._head, self._head_bytes = self._hang_up_after(BODY_S), None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop waiting, as the request is complete."""
        _stop(self._head)
        super().on_message_complete()

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


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
