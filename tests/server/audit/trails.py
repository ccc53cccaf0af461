"""Trails of audits to be tampered with: made, changed, verified."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from lcguard.server.audit.chain import Mark
from lcguard.server.audit.trail import (
    COLUMNS,
    AuditLog,
    Entry,
)
from lcguard.server.audit.verify import verify
from lcguard.server.database.writer import Database

KEY = b"k" * 32
OTHER = b"o" * 32
N = 5
WRITER = """
import sys, threading
from pathlib import Path
from lcguard.server.audit.trail import COLUMNS, AuditLog, Entry
from lcguard.server.database.writer import Database
log = AuditLog(Database(Path(sys.argv[1])), b"k" * 32)
def work(name):
    for i in range(10**9):
        seq = log.append_now(Entry("consume", request_id=f"{name}-{i}"))
        sys.stdout.write(f"{seq} {name}-{i}\\n")
        sys.stdout.flush()
for name in range(4):
    threading.Thread(target=work, args=(name,)).start()
"""


def entry(i: int) -> Entry:
    return Entry(
        "consume",
        "blocked",
        tenant="acme",
        agent=f"agent-{i}",
        source="intake",
        audience="billing",
        handle=f"handle-{i}",
        guard="gate",
        guard_digest="g" * 64,
        policy_digest="p" * 64,
        reason=f"reason {i}",
        n_tokens=i,
        request_id=f"req-{i}",
        at_ms=1_700_000_000_000 + i,
    )


def write(path: Path, n: int = N, key: bytes = KEY) -> Mark:
    with Database(path) as database:
        log = AuditLog(database, key)
        for i in range(1, n + 1):
            log.append_now(entry(i))
        return log.head()


def execute(path: Path, *statements: str, **values: Any) -> None:
    """What somebody with the file, and without the key, may do."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement, values)


def rows(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM audit ORDER BY seq").fetchall()


def problems(path: Path, **more: Any) -> list[str]:
    return verify(path, KEY, **more).problems


def remake(select: str) -> tuple[str, ...]:
    """The same table without its constraints."""
    return (
        f"CREATE TABLE other AS {select}",
        "DROP TABLE audit",
        "ALTER TABLE other RENAME TO audit",
    )


COPY = f"INSERT INTO audit SELECT {{seq}}, {', '.join(COLUMNS[1:])}, mac FROM audit WHERE seq = 2"
TAMPERINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "first deleted": (("DELETE FROM audit WHERE seq = 1",), "row 1 missing"),
    "middle deleted": (("DELETE FROM audit WHERE seq IN (2, 3)",), "rows 2 to 3 missing"),
    "last deleted": (("DELETE FROM audit WHERE seq = 5",), "row 5 missing at the end"),
    "all deleted": (("DELETE FROM audit",), "rows 1 to 5 missing at the end"),
    "deleted and renumbered": (
        ("DELETE FROM audit WHERE seq = 2", "UPDATE audit SET seq = seq - 1 WHERE seq > 2"),
        "row 2: altered",
    ),
    "swapped": (
        (
            "UPDATE audit SET seq = 99 WHERE seq = 2",
            "UPDATE audit SET seq = 2 WHERE seq = 3",
            "UPDATE audit SET seq = 3 WHERE seq = 99",
        ),
        "row 2: altered, moved",
    ),
    "copied to the end": ((COPY.format(seq=6),), "row 6: altered, moved or forged"),
    "copied to the end, head moved": (
        (COPY.format(seq=6), "UPDATE audit_head SET count = 6"),
        "row 6: altered, moved or forged",
    ),
    "copied before the start": ((COPY.format(seq=0),), "row 0: inserted"),
    "copied below zero": ((COPY.format(seq=-7),), "row -7: inserted"),
    "copied beyond a gap": ((COPY.format(seq=9),), "rows 6 to 8 missing"),
    "repeated": (
        remake("SELECT * FROM audit UNION ALL SELECT * FROM audit WHERE seq = 2"),
        "row 2: inserted or repeated",
    ),
    "numbers as text": (
        remake(f"SELECT CAST(seq AS TEXT) AS seq, {', '.join(COLUMNS[1:])}, mac FROM audit"),
        "row '1': inserted",
    ),
    "another type": (("UPDATE audit SET reason = x'00ff' WHERE seq = 2",), "row 2: altered"),
    "no UTF-8": (
        ("UPDATE audit SET reason = CAST(x'ff' AS TEXT) WHERE seq = 2",),
        "row 2: altered",
    ),
    "infinite": (("UPDATE audit SET n_tokens = 9e999 WHERE seq = 2",), "row 2: altered"),
    "mac of another type": (("UPDATE audit SET mac = x'00' WHERE seq = 5",), "row 5: altered"),
    "mac not ASCII": (("UPDATE audit SET mac = 'é' WHERE seq = 2",), "row 2: altered"),
    "head dropped": (("DELETE FROM audit_head",), "head row: missing"),
    "head count": (("UPDATE audit_head SET count = 4",), "head row: altered"),
    "head count of another type": (("UPDATE audit_head SET count = x'05'",), "head row: altered"),
    "head mac": (("UPDATE audit_head SET mac = 'aa'",), "head row: altered"),
    "head hmac": (("UPDATE audit_head SET hmac = mac",), "head row: altered"),
    "two heads": (
        (
            "CREATE TABLE other AS SELECT * FROM audit_head UNION ALL SELECT * FROM audit_head",
            "DROP TABLE audit_head",
            "ALTER TABLE other RENAME TO audit_head",
        ),
        "head row: repeated",
    ),
    "end cut off, head moved": (
        (
            "DELETE FROM audit WHERE seq = 5",
            "UPDATE audit_head SET count = 4, mac = (SELECT mac FROM audit WHERE seq = 4)",
        ),
        "head row: altered",
    ),
    "table dropped": (("DROP TABLE audit",), "no such table"),
    "column dropped": (("ALTER TABLE audit DROP COLUMN reason",), "no such column"),
    "trigger that rewrites": (
        (
            "CREATE TRIGGER t AFTER INSERT ON audit BEGIN DELETE FROM audit WHERE seq = 2; END",
            COPY.format(seq=6),
        ),
        "row 2 missing",
    ),
}


def raw(path: Path) -> list[tuple[Any, ...]]:
    """Rows with the types that SQLite has stored."""
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = lambda data: ("text", data)
        return connection.execute("SELECT * FROM audit ORDER BY seq").fetchall()
