"""How often each edge was used, counted from the audit."""

from __future__ import annotations

import threading
from collections import Counter

from lcguard.server.database.connection import Connection

Name = tuple[str, str, str]
"""Tenant, source, audience."""
DONE = ("published", "consumed", "text_guarded")
"""Events that make a hop one that was used: what is refused is only a name that somebody sent."""
CANARY_TENANT = "(canary)"
"""Whom the audit names as tenant of a canary: no key of a file can have this name."""


_AT_ONCE = 10_000


class EdgeCounts:
    """Reads on where it stopped: a long trail is counted once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._found: dict[Name, Counter[str]] = {}
        self.verdicts = Counter[tuple[str, str]]()
        """Rows by event and verdict, canaries' left out, up to the last ``update``."""

    def update(self, connection: Connection) -> dict[Name, Counter[str]]:
        """Rows of each event by edge, up to now. For ``Database.read``."""
        with self._lock:
            while rows := connection.execute(
                "SELECT seq, tenant, source, audience, event, verdict FROM audit WHERE seq > ? "
                f"ORDER BY seq LIMIT {_AT_ONCE}",
                (self._last,),
            ).fetchall():
                for seq, tenant, source, audience, event, verdict in rows:
                    self._last = seq
                    self.verdicts[event, verdict] += tenant != CANARY_TENANT
                    if source and audience and tenant != CANARY_TENANT:
                        self._found.setdefault((tenant, source, audience), Counter())[event] += 1
            return {name: Counter(found) for name, found in self._found.items()}
