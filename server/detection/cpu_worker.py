"""Work that takes the CPU, beside the event loop: one piece at a time, each with a deadline.

A thread cannot be stopped, so what it does must be bounded by itself; who waits for it is, and so
is the line: what nobody waits for any more is not begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lcguard.server.errors import ProxyError

T = TypeVar("T")


class CpuWorker:
    """The thread."""

    def __init__(self, timeout_s: float, what: str) -> None:
        """``timeout_s``: of one piece, its time in the line included."""
        self.timeout_s, self._what = timeout_s, what
        self._pool = ThreadPoolExecutor(1, "lcguard-cpu")

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """What ``work`` returns or raises. Raises ``ProxyError`` (503) where it is too late."""
        future = self._pool.submit(work, *args)
        answer = asyncio.wrap_future(future)
        answer.add_done_callback(lambda f: f.cancelled() or f.exception())  # late, it is nobody's
        try:
            done, _ = await asyncio.wait([answer], timeout=self.timeout_s)
        except asyncio.CancelledError:
            future.cancel()
            raise
        if not done:
            future.cancel()
            raise ProxyError(
                503,
                f"{self._what} took longer than {self.timeout_s:g} s: shorten the prompt, or "
                "try again later",
                code="busy",
                retry_after_s=2,
            )
        return answer.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
