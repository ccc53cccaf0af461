"""Whether the clocks of proxy, engine and store agree: handles and grants expire by all three."""

from __future__ import annotations

import time
from collections.abc import Callable

from lcguard.server.errors import ProxyError
from lcguard.server.gateway.upstream import Upstream
from lcguard.store import SegmentStore
from lcguard.store.line import StoreLine

LIMIT_S = 5.0
"""Clocks that are set by NTP differ by far less, and no time to live here is shorter than a second
that anybody could rely on."""
_HTTP_DATE_S = 1.0
"""What a date in HTTP is cut to."""


class Clocks:
    """Asks the engine and the store what time it is."""

    def __init__(
        self,
        upstream: Upstream,
        store: SegmentStore,
        line: StoreLine,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``clock``: the proxy's."""
        self._upstream, self._store, self._line, self._clock = upstream, store, line, clock

    async def check(self) -> str:
        """Raises ``ProxyError`` (503) naming the clock that is wrong, and ``StoreError``."""
        before_s = self._clock()
        self._compare("engine", await self._upstream.time_s(), before_s, _HTTP_DATE_S)
        before_s = self._clock()
        self._compare("store", await self._line.run(self._store.time_s), before_s, 0.0)
        return f"within {LIMIT_S:g} s"

    def _compare(self, whose: str, theirs_s: float | None, before_s: float, cut_s: float) -> None:
        if theirs_s is None:
            return
        # between the question and its answer, however long that took
        ahead_s, behind_s = theirs_s - self._clock(), before_s - theirs_s - cut_s
        apart_s = max(ahead_s, behind_s)
        if apart_s > LIMIT_S:
            way = "ahead of" if ahead_s > behind_s else "behind"
            raise ProxyError(
                503,
                f"the {whose}'s clock is {apart_s:.0f} s {way} the proxy's: set both by NTP, "
                "or what is fresh has expired for one of them",
                code="clock",
            )
