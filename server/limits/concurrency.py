"""How many requests are at vLLM at a time: the rest wait in a line, first come first served."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from types import TracebackType
from typing import Self

from lcguard.server.limits.key_limits import Limited

_RETRY_AFTER_S = 1


class Gate:
    """``async with gate:`` around each request. For one event loop.

    A place that comes free goes straight to the first in the line, never back to the pool, so
    that nobody who comes later can take it.
    """

    def __init__(self, max_concurrency: int, max_queue: int, queue_timeout_s: float) -> None:
        """Raises ``ValueError`` for a gate that lets nobody in."""
        if max_concurrency < 1 or max_queue < 0 or queue_timeout_s <= 0:
            raise ValueError(
                f"Gate({max_concurrency}, {max_queue}, {queue_timeout_s}): give at least 1 place, "
                "a queue of 0 or more and a timeout above 0 s"
            )
        self.max_concurrency, self.max_queue = max_concurrency, max_queue
        self.queue_timeout_s = queue_timeout_s
        self.running = 0
        """Requests that have a place."""
        self._line: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    async def acquire(self) -> None:
        """Waits for a place. Raises ``Limited`` where the line is full, or the wait too long."""
        if self.running < self.max_concurrency and not self._line:
            self.running += 1
            return
        if len(self._line) >= self.max_queue:
            raise Limited(
                f"{self.max_concurrency} requests are running and {len(self._line)} waiting: try "
                "again later",
                _RETRY_AFTER_S,
            )
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self._line[place] = None
        timer = loop.call_later(self.queue_timeout_s, self._give_up, place)
        try:
            await place
        except asyncio.CancelledError:
            # given the place and cancelled in the same turn of the loop: it goes on to the next
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release()
            raise
        finally:
            timer.cancel()
            self._line.pop(place, None)

    def release(self) -> None:
        """Ends one request."""
        while self._line:
            place, _ = self._line.popitem(last=False)
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1

    def _give_up(self, place: asyncio.Future[None]) -> None:
        if not place.done():
            self._line.pop(place, None)
            place.set_exception(
                Limited(f"no place came free within {self.queue_timeout_s:g} s", _RETRY_AFTER_S)
            )

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
