"""``lcguard audit verify`` and ``lcguard audit show``."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcguard.server.audit.trail import REASON_CHARS, plain, recent
from lcguard.server.audit.verify import verify
from lcguard.server.database.connection import DatabaseError
from lcguard.server.database.place import place_of, reading

_BUSY_TIMEOUT_S = 5.0


def verify_command(
    where: Path | str,
    key: bytes,
    head: str | None = None,
    at_least: int | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Says what ``audit_verify.verify`` found; 0 where the trail is whole, else 1.

    Raises ``ValueError`` in one line where nothing can be read or ``head`` is none.
    """
    try:
        found = verify(where, key, head=head, at_least=at_least)
    except DatabaseError as error:
        raise ValueError(str(error)) from None
    for problem in found.problems:
        say(problem)
    if found.problems:
        say(f"{where}: {found.rows} rows, NOT as they were written")
        return 1
    say(f"{where}: {found.rows} rows, whole")
    say(f"head {found.head}")
    if head is None:
        say("keep this head elsewhere: with --head it shows later whether the file was put back")
    return 0


def show_command(
    where: Path | str,
    *,
    last: int = 50,
    tenant: str | None = None,
    event: str | None = None,
    request_id: str | None = None,
    handle: str | None = None,
    as_json: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Says the last rows that match, oldest first; they are not verified. Always 0.

    Raises ``ValueError`` in one line where nothing can be read.
    """
    if last < 1:
        raise ValueError(f"last={last}: give at least 1")
    try:
        with reading(place_of(where, _BUSY_TIMEOUT_S)) as connection:
            rows = recent(
                connection,
                last=last,
                tenant=tenant,
                event=event,
                request_id=request_id,
                handle=handle,
            )
    except DatabaseError as error:
        raise ValueError(str(error)) from None
    for row in rows:
        say(json.dumps(row, default=str) if as_json else _line(row))
    return 0


def _line(row: dict[str, Any]) -> str:
    edge = f"{row['source']} -> {row['audience']}" if row["source"] or row["audience"] else ""
    parts = (
        row["seq"],
        _time(row["at_ms"]),
        row["event"],
        row["verdict"],
        row["tenant"],
        row["agent"],
        edge,
        row["handle"],
        row["guard"],
        row["request_id"],
        row["reason"],
    )
    # Cleaned again: whoever can alter the file must not steer the terminal of its reader.
    return "  ".join(text for part in parts if (text := plain(str(part), REASON_CHARS)))


def _time(at_ms: object) -> str:
    try:
        return datetime.fromtimestamp(int(str(at_ms)) / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"at_ms={at_ms}"
