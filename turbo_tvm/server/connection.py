"""uvicorn's HTTP connection with limits: for heads that never end or are too large, for bodies that never begin, for
answers that nobody reads.

A body that comes slowly has its limit in `endpoint`, a connection that is kept and not used in uvicorn.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 60.0  # from the connection, or a request's first byte, to the end of its head: nginx's client_header_timeout
READ_S = 60.0  # in which a client that does not read must read some: nginx's send_timeout
BODY_S = 90.0  # for a body, should none of it come; `endpoint` answers one that comes slowly
HEAD_BYTES = 64 << 10  # of a request's first line and headers


class TimedConnection(HttpToolsProtocol):
    """Hangs up on who is too slow, so that its memory and its descriptor come back."""

    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None
    _head_bytes: int | None = 0  # of a head that has not ended; None where none is awaited
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The head may begin."""
        super().connection_made(transport)
        self._head = self._hang_up_after(HEAD_S)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of neither: uvicorn forgets its own limit with any of them."""
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.transport.abort()
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.parser is not None and (self._head is None or self._head.cancelled()):
            self._head = self._hang_up_after(HEAD_S)

    def on_message_begin(self) -> None:
        """A head has begun."""
        _stop(self._head)
        self._head, self._head_bytes = self._hang_up_after(HEAD_S), 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is there, and a body may come."""
        _stop(self._head)
        self._head, self._head_bytes = self._hang_up_after(BODY_S), None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there."""
        _stop(self._head)
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not read."""
        _stop(self._answer)
        self._unread = self.transport.get_write_buffer_size()
        self._answer = self.loop.call_later(READ_S, self._hang_up_if_unread)
        super().pause_writing()

    def _hang_up_if_unread(self) -> None:
        """Unless the client has read some meanwhile."""
        left = self.transport.get_write_buffer_size()
        if left >= self._unread:
            self.transport.abort()
            return
        self._unread, self._answer = left, self.loop.call_later(READ_S, self._hang_up_if_unread)

    def resume_writing(self) -> None:
        """The client reads."""
        _stop(self._answer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Either side has hung up."""
        _stop(self._head)
        _stop(self._answer)
        super().connection_lost(exc)

    def _hang_up_after(self, seconds: float) -> asyncio.TimerHandle:
        transport: Any = self.transport
        return self.loop.call_later(seconds, transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
