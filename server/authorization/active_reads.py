"""Which running requests read which segments: a revocation ends them, at whichever proxy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager

from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.database.writer import Database
from lcguard.server.errors import ProxyError
from lcguard.server.leakage.ledger import revoked_among

logger = logging.getLogger("lcguard.server")
LOOK_S = 0.4
"""Between two looks at the ledger while segments are read."""
TELL_S = 3.0
"""How long the ledger may be silent before nobody can tell what was revoked."""


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

    def handles(self) -> frozenset[str]:
        """Those that are read now."""
        return frozenset(self._by_handle)

    def end(self, handles: Iterable[str]) -> int:
        """Ends every request that reads one of them; returns how many, those included that are
        ending already: a second cancellation would break off what they still write down."""
        found = {one for name in handles for one in self._by_handle.get(name, ())}
        for one in found:
            if one.ended:
                continue
            one.ended = True
            if one.task is not None:
                one.task.cancel()
        return len(found)


async def end_revoked(reads: ActiveReads, database: Database) -> None:
    """Until cancelled: ends what reads a segment that another proxy revoked.

    Where the ledger says nothing for ``TELL_S``, all of it ends: nobody can tell.
    """
    clock = asyncio.get_running_loop().time
    told_s = clock()
    while True:
        await asyncio.sleep(LOOK_S)
        handles = reads.handles()
        if not handles:
            told_s = clock()
            continue
        try:
            async with asyncio.timeout(TELL_S):
                found = await asyncio.to_thread(database.read, _revoked(handles))
        except (DatabaseError, TimeoutError) as error:
            if clock() - told_s < TELL_S:
                continue
            n = reads.end(handles)
            logger.warning("%d answers ended, the ledger cannot be read: %s", n, error)
        else:
            reads.end(found)
        told_s = clock()


def _revoked(handles: Set[str]) -> Callable[[Connection], list[str]]:
    return lambda connection: revoked_among(connection, handles)
