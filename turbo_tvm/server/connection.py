"""uvicorn's HTTP connection with limits of time: for a head that never ends, and for an answer that nobody reads.

A body has its limit in `endpoint`, a connection that is kept and not used in uvicorn.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 60.0  # from the connection, or a request's first byte, to the end of its head: nginx's client_header_timeout
READ_S = 60.0  # in which a client that does not read must read some: nginx's send_timeout


class TimedConnection(HttpToolsProtocol):
    """Hangs up on who is too slow, so that its memory and its descriptor come back."""

    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The head may begin."""
        super().connection_made(transport)
        self._head = self._hang_up_after(HEAD_S)

    def on_message_begin(self) -> None:
        """A head has begun."""
        _stop(self._head)
        self._head = self._hang_up_after(HEAD_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is there."""
        _stop(self._head)
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The client does not read."""
        _stop(self._answer)
        self._answer = self._hang_up_after(READ_S)
        super().pause_writing()

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
