"""The audit trail: one row for each thing that an agent or an operator did, chained by HMACs.

    log = AuditLog(database, key)
    await log.append(Entry("consume", tenant="acme", agent="billing", handle=handle))

No row holds text of a prompt. ``audit_verify`` finds what was altered; this module refuses to go
on with a trail that does not end as it left it.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from lcguard.server.audit.chain import Chain, Mark
from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.database.writer import Database

Event = Literal[
    "start",
    "stop",
    "publish",
    "published",
    "consume",
    "consumed",
    "refused",
    "aborted",
    "failed",
    "revoked",
    "declassified",
    "text",
    "text_guarded",
    "text_restored",
    "policy",
    "keys",
    "edge_closed",
    "edge_opened",
    "canary",
    "admin",
]
Verdict = Literal["allowed", "blocked", "error"]
EVENTS: tuple[str, ...] = get_args(Event)
VERDICTS: tuple[str, ...] = get_args(Verdict)
REASON_CHARS = 300
_NAME_CHARS = 256


class AuditError(DatabaseError):
    """The stored trail is not the one that was written with this key. Nothing was appended."""


@dataclass(frozen=True)
class Entry:
    """One row, before it has its place. Strings lose control characters and what is too long:
    a hostile name must neither forge a line of a report nor prevent the row."""

    event: Event
    verdict: Verdict = "allowed"
    tenant: str = ""
    agent: str = ""
    """Who asked."""
    source: str = ""
    audience: str = ""
    handle: str = ""
    guard: str = ""
    guard_digest: str = ""
    policy_digest: str = ""
    reason: str = ""
    """Up to 300 characters, never of a prompt."""
    n_tokens: int = 0
    request_id: str = ""
    at_ms: int = 0
    """Unix time; 0: when it is appended."""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for an event, a verdict or a number that no row can have."""
        if self.event not in EVENTS:
            raise ValueError(f"event {self.event!r} is unknown: use one of {', '.join(EVENTS)}")
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r}: use one of {', '.join(VERDICTS)}")
        for name in ("n_tokens", "at_ms"):
            value = getattr(self, name)
            # A float would be stored as an integer and read back as another row.
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"{name} is {value!r}: give a whole number from 0")
        for field in fields(self):
            if field.type == "str":
                n = REASON_CHARS if field.name == "reason" else _NAME_CHARS
                object.__setattr__(self, field.name, plain(getattr(self, field.name), n))


COLUMNS = ("seq", *(f.name for f in fields(Entry)))
"""What a row's mac covers."""
_INSERT = (
    f"INSERT INTO audit ({', '.join(COLUMNS)}, mac) "
    f"VALUES ({', '.join(f':{name}' for name in COLUMNS)}, :mac)"
)


class AuditLog:
    """Appends to the trail of one database; several processes may."""

    def __init__(
        self, database: Database, key: bytes, clock: Callable[[], float] = time.time
    ) -> None:
        """Begins the trail where there is none.

        Args:
            key: the deployment key.
            clock: Unix time in seconds.

        Raises:
            AuditError: the trail was made with another key, or altered at its end.
            DatabaseError: as ``Database.write``.
        """
        self.database, self.chain, self.clock = database, Chain(key), clock
        self._seen = Mark()
        self._saw(database.write_now(self._begin))

    async def append(self, entry: Entry, also: Callable[[Connection], object] | None = None) -> int:
        """Adds a row; returns its number once it is on the disk.

        ``also`` runs before it in the same transaction: both are kept, or neither. What it raises
        is raised here.

        Raises:
            AuditError: the trail is not as this log left it.
            DatabaseError: as ``Database.write``.
        """
        return self._saw(await self.database.write(self._work([entry], also)))

    async def append_all(
        self, entries: Sequence[Entry], also: Callable[[Connection], object] | None = None
    ) -> int:
        """``append`` of several rows at once: all of them or none."""
        return self._saw(await self.database.write(self._work(entries, also)))

    def append_now(self, entry: Entry, also: Callable[[Connection], object] | None = None) -> int:
        """``append`` for callers without an event loop."""
        return self._saw(self.database.write_now(self._work([entry], also)))

    def head(self) -> Mark:
        """How far the trail goes now. Raises as ``append``."""
        return self.database.read(self._head)

    def _work(
        self, entries: Sequence[Entry], also: Callable[[Connection], object] | None
    ) -> Callable[[Connection], Mark]:
        now_ms = int(self.clock() * 1000)
        entries = [replace(e, at_ms=e.at_ms or now_ms) for e in entries]

        def work(connection: Connection) -> Mark:
            if also is not None:
                also(connection)
            mark = self._head(connection)
            for entry in entries:
                row = {"seq": mark.count + 1, **asdict(entry)}
                mark = Mark(mark.count + 1, self.chain.row(mark.mac, row))
                connection.execute(_INSERT, {**row, "mac": mark.mac})
            self._write_head(connection, mark)
            return mark

        return work

    def _saw(self, mark: Mark) -> int:
        # After the COMMIT only; with several in flight the furthest counts.
        if mark.count > self._seen.count:
            self._seen = mark
        return mark.count

    def _begin(self, connection: Connection) -> Mark:
        (n,) = connection.execute(
            "SELECT (SELECT count(*) FROM audit_head) + (SELECT count(*) FROM "
            "(SELECT 1 FROM audit LIMIT 1) AS any_row)"
        ).fetchone()
        if n == 0:
            self._write_head(connection, Mark())
        return self._head(connection)

    def _write_head(self, connection: Connection, mark: Mark) -> None:
        connection.execute(
            "INSERT INTO audit_head (id, count, mac, hmac) VALUES (1, ?, ?, ?) ON CONFLICT (id) "
            "DO UPDATE SET count = EXCLUDED.count, mac = EXCLUDED.mac, hmac = EXCLUDED.hmac",
            (mark.count, mark.mac, self.chain.head(mark)),
        )

    def _head(self, connection: Connection) -> Mark:
        """The head, if it is ours, covers the last row, and holds all that this log appended."""
        found = connection.execute("SELECT count, mac, hmac FROM audit_head").fetchone()
        if found is None:
            raise self._altered("its head row is missing")
        if not self.chain.is_head(*found):
            raise self._altered("its head was made with another key, or altered")
        mark = Mark(*found[:2])
        last = connection.execute(
            "SELECT seq, mac FROM audit ORDER BY seq DESC LIMIT 1"
        ).fetchone() or (0, Mark().mac)
        if last != (mark.count, mark.mac):
            raise self._altered(f"it ends with row {last[0]}, its head is for row {mark.count}")
        seen = self._seen
        if seen.count and connection.execute(
            "SELECT mac FROM audit WHERE seq = ?", (seen.count,)
        ).fetchone() != (seen.mac,):
            raise self._altered(f"it was put back to a state before row {seen.count}")
        return mark

    def _altered(self, why: str) -> AuditError:
        return AuditError(
            f"{self.database.place.name}: the audit trail cannot go on, {why}: run `lcguard audit "
            "verify`, keep what is there, and start a new one"
        )


def recent(
    connection: Connection,
    *,
    last: int = 50,
    tenant: str | None = None,
    event: str | None = None,
    request_id: str | None = None,
    handle: str | None = None,
) -> list[dict[str, Any]]:
    """The last rows that match, oldest first, not verified. For ``Database.read``."""
    wanted = {"tenant": tenant, "event": event, "request_id": request_id, "handle": handle}
    given = {name: value for name, value in wanted.items() if value is not None}
    where = " AND ".join(f"{name} = :{name}" for name in given) or "TRUE"
    rows = connection.execute(
        f"SELECT {', '.join(COLUMNS)} FROM audit WHERE {where} ORDER BY seq DESC LIMIT :last",
        {**given, "last": last},
    ).fetchall()
    return [dict(zip(COLUMNS, row, strict=True)) for row in reversed(rows)]


def plain(text: str, max_chars: int) -> str:
    """One line of at most ``max_chars`` characters, without any that steer a terminal."""
    kept = "".join(c if unicodedata.category(c)[0] not in "CZ" else " " for c in text[: 4 * 1024])
    return " ".join(kept.split())[:max_chars].rstrip()
