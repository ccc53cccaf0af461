"""Calls to a store on threads of their own, each with a deadline.

A store may be a server that has stopped, or a disk that hangs. Whoever serves many requests on one
thread (an event loop, an engine's scheduler) hands the call over here and goes on; what is not
answered in time has failed, and what comes too late is undone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from lcguard.store.base import StoreError

T = TypeVar("T")


class Call(Generic[T]):
    """One call on its way, to be polled."""

    def __init__(
        self, line: StoreLine, call: Callable[[], T], undo: Callable[[], object] | None
    ) -> None:
        self._line, self._call, self._undo = line, call, undo
        self._lock = threading.Lock()
        self._left = self._done = False
        self._until_s = time.monotonic() + line.timeout_s
        self._future: Future[T] = line.pool.submit(self._run)

    def ended(self) -> bool:
        """Whether ``result`` answers now: the call came back, or its time is up."""
        return self._future.done() or time.monotonic() >= self._until_s

    def result(self) -> T:
        """What the call returned or raised; once it has ended. Raises ``StoreError`` for one that
        is too late, which is undone as soon as it comes back."""
        if not self._future.done() and self._leave():
            raise self._line.late()
        return self._future.result()

    def drop(self) -> None:
        """Nobody wants it any more: it is not begun, or undone."""
        if not self._leave() and self._undo is not None and self._future.exception() is None:
            self._line.submit(self._undo)

    def _leave(self) -> bool:
        """Whether it could be left; False where it had come back already."""
        with self._lock:
            if self._done:
                return False
            self._left = True
        self._future.cancel()
        return True

    def _run(self) -> T:
        try:
            value = self._call()
        except BaseException:
            with self._lock:
                self._done = True
            raise
        with self._lock:
            self._done, left = not self._left, self._left
        if left and self._undo is not None:
            self._undo()
        return value


class StoreLine:
    """The threads. Calls beyond their number wait, no longer than the deadline."""

    def __init__(self, timeout_s: float, threads: int = 4) -> None:
        """``timeout_s``: of one call, its time in the line included."""
        self.timeout_s = timeout_s
        self.pool = ThreadPoolExecutor(threads, "lcguard-store")

    def submit(self, call: Callable[[], T], undo: Callable[[], object] | None = None) -> Call[T]:
        """Begins a call. ``undo``: for one that succeeded when nobody waited any more."""
        return Call(self, call, undo)

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """The call's result. Raises what it raises, and ``StoreError`` where it is too late."""
        future = self.pool.submit(call, *args)
        answer = asyncio.wrap_future(future)
        answer.add_done_callback(_looked_at)
        done, _ = await asyncio.wait([answer], timeout=self.timeout_s)
        if not done:
            future.cancel()
            raise self.late()
        return answer.result()

    def late(self) -> StoreError:
        return StoreError(
            f"the store did not answer within {self.timeout_s:g} s: is it overloaded?"
        )

    def close(self, wait: bool = True) -> None:
        """What waits is not begun; with ``wait``, returns when what runs has ended."""
        self.pool.shutdown(wait=wait, cancel_futures=True)


def _looked_at(future: asyncio.Future[Any]) -> None:
    """An error that comes after its deadline is nobody's."""
    if not future.cancelled():
        future.exception()
