"""uvicorn's HTTP with a limit on the time that a request's head and body, and its answer, may take.

uvicorn closes idle connections only between requests: a client that sends a head byte by byte, or
none, would hold its connection for ever, and so would one that goes on sending the body of a
request that was refused without it, and one that does not read its answer: with it the request's
place at vLLM.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class TimedHttp(HttpToolsProtocol):
    """Closes a connection whose request's head is late, or whose body is twice as late: by then
    a route that wants the body has refused it with a reason. Cuts one whose answer is not taken."""

    head_timeout_s: ClassVar[float] = 10.0
    write_timeout_s: ClassVar[float] = 30.0
    _late: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None

    @classmethod
    def with_timeouts(cls, head_s: float, write_s: float) -> type[TimedHttp]:
        """A protocol class with these limits."""
        limits = {"head_timeout_s": head_s, "write_timeout_s": write_s}
        return type("TimedHttp", (cls,), limits)

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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_later()

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport is not None and self.transport.is_closing():
            self._cut_later()

    def eof_received(self) -> None:
        super().eof_received()
        self._cut_later()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._cut_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._taken()
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
            self._cut_later()

    def _cut_later(self) -> None:
        """A closed connection is there until its client has taken what is left, or for ever."""
        if self._untaken is None:
            self._untaken = self.loop.call_later(self.write_timeout_s, self._cut)

    def _taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None

    def _cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()
