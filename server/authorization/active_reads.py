"""Which running requests read which segments: a revocation ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lcguard.server.errors import ProxyError


class ActiveRead:
    """A request that reads segments."""

    def __init__(self, task: asyncio.Task[object] | None) -> None:
        self.task, self.ended = task, False
        """Whether a revocation ended it."""


class ActiveReads:
    """Of one event loop."""

    def __init__(self) -> None:
        self._by_handle: dict[str, set[ActiveRead]] = {}

    @contextmanager
    def reading(self, handles: Iterable[str]) -> Iterator[ActiveRead]:
        """Around the request, from before its segments are looked at: then a revocation is either
        seen by that look, or ends the request here.

        Raises ``ProxyError`` (403) in a request that a revocation ended.
        """
        one = ActiveRead(asyncio.current_task())
        names = set(handles)
        for name in names:
            self._by_handle.setdefault(name, set()).add(one)
        try:
            yield one
        except asyncio.CancelledError:
            if not one.ended:
                raise
            if one.task is not None:
                one.task.uncancel()
            raise ProxyError(
                403,
                "a segment that this request reads was revoked: its answer ends here",
                code="revoked",
            ) from None
        finally:
            for name in names:
                self._by_handle[name].discard(one)
                if not self._by_handle[name]:
                    del self._by_handle[name]

    def end(self, handles: Iterable[str]) -> int:
        """Ends every request that reads one of them; returns how many."""
        found = {one for name in handles for one in self._by_handle.get(name, ())}
        for one in found:
            one.ended = True
            if one.task is not None:
                one.task.cancel()
        return len(found)
