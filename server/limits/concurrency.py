"""How many requests are at vLLM at a time: the rest wait in a line, first come first served."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from lcguard.server.limits.key_limits import Limited

_RETRY_AFTER_S = 1


class ConcurrencyLimit:
    """``async with`` it around each request. For one event loop.

    ``asyncio.Semaphore`` hands a place that comes free to the first in the line, so that nobody who
    comes later can take it; the bounds on the line and on the wait are ours.
    """

    def __init__(self, max_concurrency: int, max_queue: int, queue_timeout_s: float) -> None:
        """Raises ``ValueError`` for a limit that lets nobody in."""
        if max_concurrency < 1 or max_queue < 0 or queue_timeout_s <= 0:
            raise ValueError(
                f"ConcurrencyLimit({max_concurrency}, {max_queue}, {queue_timeout_s}): give at "
                "least 1 place, a queue of 0 or more and a timeout above 0 s"
            )
        self.max_concurrency, self.max_queue = max_concurrency, max_queue
        self.queue_timeout_s = queue_timeout_s
        self.running = 0
        """Requests that have a place."""
        self.waiting = 0
        """Requests in the line."""
        self._places = asyncio.Semaphore(max_concurrency)

    async def acquire(self) -> None:
        """Waits for a place. Raises ``Limited`` where the line is full, or the wait too long."""
        if self._places.locked() and self.waiting >= self.max_queue:
            raise Limited(
                f"{self.max_concurrency} requests are running and {self.waiting} waiting: try "
                "again later",
                _RETRY_AFTER_S,
            )
        self.waiting += 1
        try:
            async with asyncio.timeout(self.queue_timeout_s):
                await self._places.acquire()
        except TimeoutError:
            raise Limited(
                f"no place came free within {self.queue_timeout_s:g} s", _RETRY_AFTER_S
            ) from None
        finally:
            self.waiting -= 1
        self.running += 1

    def release(self) -> None:
        """Ends one request."""
        self.running -= 1
        self._places.release()

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
