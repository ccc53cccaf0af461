"""uvicorn's HTTP with a limit on the time that a request's head and body may take.

uvicorn closes idle connections only between requests: a client that sends a head byte by byte, or
none, would hold its connection for ever, and so would one that goes on sending the body of a
request that was refused without it.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class TimedHttp(HttpToolsProtocol):
    """Closes a connection whose request's head is late, or whose body is twice as late: by then
    a route that wants the body has refused it with a reason."""

    head_timeout_s: ClassVar[float] = 10.0
    _late: asyncio.TimerHandle | None = None

    @classmethod
    def with_timeout(cls, seconds: float) -> type[TimedHttp]:
        """A protocol class with this limit."""
        return type("TimedHttp", (cls,), {"head_timeout_s": seconds})

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait(self.head_timeout_s)

    def on_message_begin(self) -> None:
        self._wait(self.head_timeout_s)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._wait(2 * self.head_timeout_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        self._stop()
        self._late = self.loop.call_later(seconds, self._close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
