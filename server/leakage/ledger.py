"""Which segments there are, and who received how many of whose.

Functions on a connection: for ``Database.read``, ``Database.write``, or as the ``also`` of an audit
row, so that a reservation and its row are kept together or not at all::

    await log.append(entry, also=partial(
        reserve, tenant="acme", audience="billing", handles=[(handle, "intake")],
        budget=20, window_s=86400, now_s=now))

Every segment of a source tells an audience a little more about the same records. The *budget* of
an edge bounds how many distinct ones it gets within a window; a segment's noise is drawn once, so
the same one again costs nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime

from lcguard.server.database.connection import Connection

KEEP_SEGMENTS_S = 86_400.0
"""How long an expired segment stays listed."""
KEEP_RECEIVED_S = 90 * 86_400.0
"""How long a receipt is kept: the longest window that a budget may have."""


class LedgerError(ValueError):
    """What the ledger does not let happen. One line; nothing was written."""


class SegmentRevoked(LedgerError):
    """A handle that was revoked, maybe while the request was on its way."""


class BudgetSpent(LedgerError):
    """The audience would receive too many distinct segments of one source."""

    def __init__(
        self, audience: str, source: str, budget: int, window_s: float, frees_at_s: float | None
    ) -> None:
        if frees_at_s is None:
            fix = "ask for fewer at a time"
        else:
            when = datetime.fromtimestamp(frees_at_s, UTC).isoformat(timespec="seconds")
            fix = f"there is room again at {when}"
        super().__init__(
            f"audience {audience!r} may receive {budget} segments of source {source!r} in "
            f"{window_s:g} s: {fix}"
        )
        self.audience, self.source, self.budget = audience, source, budget
        self.frees_at_s = frees_at_s
        """Unix time at which the same request fits, the oldest having left the window; None where
        it never will, with more segments than the budget."""


@dataclass(frozen=True)
class Segment:
    """A published segment."""

    handle: str
    tenant: str
    source: str
    audience: str
    created_at_s: float
    """Unix time, like the next."""
    expires_at_s: float
    n_tokens: int
    guard: str
    guard_digest: str
    policy_digest: str
    parents: tuple[str, ...] = ()
    """Handles that its publisher had consumed."""
    revoked_at_s: float | None = None
    draw: str = ""
    """Of its manifest; empty where there is no noise."""
    record: str = ""
    """What it is a draw of: see ``lcguard.server.leakage.draw_budget``."""


_COLUMNS = tuple(f.name for f in fields(Segment))
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM segments"
_INSERT = (
    f"INSERT INTO segments ({', '.join(_COLUMNS)}) "
    f"VALUES ({', '.join(f':{name}' for name in _COLUMNS)}) ON CONFLICT DO NOTHING"
)


def record_segment(connection: Connection, segment: Segment) -> None:
    """Lists a new segment.

    Raises:
        SegmentRevoked: one of its parents was.
        LedgerError: the handle is taken.
    """
    _refuse_revoked(connection, segment.parents)
    row = {**asdict(segment), "parents": json.dumps(segment.parents)}
    if not connection.execute(_INSERT, row).rowcount:
        raise LedgerError(f"handle {_shown(segment.handle)} is taken: make a new one")
    for parent in segment.parents:
        connection.execute(
            "INSERT INTO ancestors (ancestor, handle) "
            "SELECT ancestor, :handle FROM ancestors WHERE handle = :parent "
            "UNION SELECT :parent, :handle WHERE TRUE ON CONFLICT DO NOTHING",
            {"handle": segment.handle, "parent": parent},
        )


def reserve(
    connection: Connection,
    tenant: str,
    audience: str,
    handles: Sequence[tuple[str, str]],
    budget: int | None,
    window_s: float,
    now_s: float,
) -> None:
    """Books that ``audience`` receives these segments, before it does; all of them or none.

    Args:
        handles: (handle, source) of each.
        budget: distinct segments of one source within ``window_s``; None: any number.

    Raises:
        BudgetSpent: too many of one source.
        SegmentRevoked: one of them was revoked.
        ValueError: a negative budget, or a window that receipts are not kept for.
    """
    if (budget is not None and budget < 0) or not 0 < window_s <= KEEP_RECEIVED_S:
        raise ValueError(
            f"budget={budget}, window_s={window_s:g}: give a budget from 0 and a window up to "
            f"{KEEP_RECEIVED_S:g} s"
        )
    _refuse_revoked(connection, [handle for handle, _ in handles])
    new = {
        handle: source
        for handle, source in handles
        if not connection.execute(
            "SELECT 1 FROM received WHERE tenant = ? AND audience = ? AND handle = ?",
            (tenant, audience, handle),
        ).fetchone()
    }
    if budget is not None:
        for source, n_new in Counter(new.values()).items():
            _check_budget(connection, tenant, audience, source, n_new, budget, window_s, now_s)
    connection.executemany(
        "INSERT INTO received (tenant, audience, handle, source, at_s) VALUES (?, ?, ?, ?, ?)",
        [(tenant, audience, handle, source, now_s) for handle, source in new.items()],
    )


def live(connection: Connection, tenant: str, now_s: float) -> list[Segment]:
    """The tenant's segments that can still be consumed, newest first."""
    rows = connection.execute(
        f"{_SELECT} WHERE tenant = ? AND expires_at_s > ? AND revoked_at_s IS NULL "
        "ORDER BY created_at_s DESC, handle",
        (tenant, now_s),
    )
    return [_segment(row) for row in rows]


def find(connection: Connection, handle: str) -> Segment | None:
    """The segment of any tenant, also expired or revoked; None where it is not listed."""
    row = connection.execute(f"{_SELECT} WHERE handle = ?", (handle,)).fetchone()
    return None if row is None else _segment(row)


def revoke(connection: Connection, handle: str, now_s: float, cascade: bool) -> list[str]:
    """Marks a segment revoked, with ``cascade`` also all that was published on top of it.

    Returns the handles that were not revoked before, sorted: to be deleted from the store. Whether
    the caller may revoke is for ``find`` and its tenant to say.
    """
    on_top = "OR handle IN (SELECT handle FROM ancestors WHERE ancestor = :handle)"
    where = f"(handle = :handle {on_top if cascade else ''}) AND revoked_at_s IS NULL"
    values = {"handle": handle, "now_s": now_s}
    found = connection.execute(f"SELECT handle FROM segments WHERE {where}", values).fetchall()
    connection.execute(f"UPDATE segments SET revoked_at_s = :now_s WHERE {where}", values)
    return sorted(row[0] for row in found)


def revoked_among(connection: Connection, handles: Iterable[str]) -> list[str]:
    """Those of ``handles`` that were revoked."""
    return [
        handle
        for handle in sorted(handles)
        if (row := find(connection, handle)) is not None and row.revoked_at_s is not None
    ]


def received_counts(
    connection: Connection, tenant: str, window_s: float, now_s: float
) -> dict[tuple[str, str], int]:
    """(source, audience) -> distinct segments received within the window."""
    rows = connection.execute(
        "SELECT source, audience, count(*) FROM received WHERE tenant = ? AND at_s + ? > ? "
        "GROUP BY source, audience ORDER BY source, audience",
        (tenant, window_s, now_s),
    )
    return {(source, audience): n for source, audience, n in rows}


def sweep(connection: Connection, now_s: float) -> int:
    """Forgets segments that expired over a day ago, and receipts that no window covers.

    Returns how many segments went.
    """
    gone = "SELECT handle FROM segments WHERE expires_at_s < ?"
    before = (now_s - KEEP_SEGMENTS_S,)
    connection.execute(f"DELETE FROM ancestors WHERE handle IN ({gone})", before)
    n = connection.execute("DELETE FROM segments WHERE expires_at_s < ?", before).rowcount
    connection.execute("DELETE FROM received WHERE at_s < ?", (now_s - KEEP_RECEIVED_S,))
    return n


def _check_budget(
    connection: Connection,
    tenant: str,
    audience: str,
    source: str,
    n_new: int,
    budget: int,
    window_s: float,
    now_s: float,
) -> None:
    # Compared as a sum, as `frees_at_s` is formed, so that the time it names is not too early.
    times = [
        at_s
        for (at_s,) in connection.execute(
            "SELECT at_s FROM received WHERE tenant = ? AND audience = ? AND source = ? "
            "AND at_s > ? ORDER BY at_s",
            (tenant, audience, source, now_s - window_s - 1),
        )
        if at_s + window_s > now_s
    ]
    surplus = len(times) + n_new - budget
    if surplus > 0:
        frees_at_s = times[surplus - 1] + window_s if n_new <= budget else None
        raise BudgetSpent(audience, source, budget, window_s, frees_at_s)


def _refuse_revoked(connection: Connection, handles: Sequence[str]) -> None:
    """In the same transaction as what follows: a revocation cannot come between."""
    for handle in handles:
        segment = find(connection, handle)
        if segment is not None and segment.revoked_at_s is not None:
            raise SegmentRevoked(f"segment {_shown(handle)} was revoked: publish again")


def _segment(row: Sequence[object]) -> Segment:
    values = dict(zip(_COLUMNS, row, strict=True))
    return Segment(**{**values, "parents": tuple(json.loads(str(values["parents"])))})  # type: ignore[arg-type]


def _shown(handle: str) -> str:
    return f"{handle[:6]}..."
