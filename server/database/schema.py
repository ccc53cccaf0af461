"""Tables of the proxy's one SQLite file: the audit trail, the ledger and the values behind
placeholders of text."""

from __future__ import annotations

import sqlite3

VERSION = 3
"""``user_version`` of the file. An older one is brought up to it; no newer one is used."""
APPLICATION_ID = 0x4C434744
"""``application_id``, "LCGD": tells the file from another program's."""

_DRAWS = (
    """CREATE TABLE draws (
        tenant TEXT NOT NULL,
        audience TEXT NOT NULL,
        source TEXT NOT NULL,
        record TEXT NOT NULL,
        draw TEXT NOT NULL,
        at_s REAL NOT NULL,
        PRIMARY KEY (tenant, audience, source, record, draw)
    ) WITHOUT ROWID""",
    """CREATE TABLE texts (
        tenant TEXT NOT NULL,
        source TEXT NOT NULL,
        audience TEXT NOT NULL,
        n_words INTEGER NOT NULL,
        at_s REAL NOT NULL,
        record TEXT NOT NULL,
        words BLOB NOT NULL
    )""",
    "CREATE INDEX texts_by_size ON texts (tenant, source, audience, n_words, at_s)",
)
_FROM_1 = (
    "ALTER TABLE segments ADD COLUMN draw TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE segments ADD COLUMN record TEXT NOT NULL DEFAULT ''",
    *_DRAWS,
)
_FROM_2 = (
    """CREATE TABLE originals (
        tenant TEXT NOT NULL,
        conversation TEXT NOT NULL,
        name TEXT NOT NULL,
        source TEXT NOT NULL,
        audience TEXT NOT NULL,
        expires_at_s REAL NOT NULL,
        sealed BLOB NOT NULL,
        PRIMARY KEY (tenant, conversation, name, source, audience)
    ) WITHOUT ROWID""",
    "CREATE INDEX originals_by_expiry ON originals (expires_at_s)",
)
_TABLES = (
    """CREATE TABLE audit (
        seq INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        request_id TEXT NOT NULL,
        event TEXT NOT NULL,
        tenant TEXT NOT NULL,
        agent TEXT NOT NULL,
        source TEXT NOT NULL,
        audience TEXT NOT NULL,
        handle TEXT NOT NULL,
        guard TEXT NOT NULL,
        guard_digest TEXT NOT NULL,
        policy_digest TEXT NOT NULL,
        verdict TEXT NOT NULL,
        reason TEXT NOT NULL,
        n_tokens INTEGER NOT NULL,
        mac TEXT NOT NULL
    )""",
    """CREATE TABLE audit_head (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        count INTEGER NOT NULL,
        mac TEXT NOT NULL,
        hmac TEXT NOT NULL
    )""",
    """CREATE TABLE segments (
        handle TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        source TEXT NOT NULL,
        audience TEXT NOT NULL,
        created_at_s REAL NOT NULL,
        expires_at_s REAL NOT NULL,
        n_tokens INTEGER NOT NULL,
        guard TEXT NOT NULL,
        guard_digest TEXT NOT NULL,
        policy_digest TEXT NOT NULL,
        parents TEXT NOT NULL,
        revoked_at_s REAL,
        draw TEXT NOT NULL DEFAULT '',
        record TEXT NOT NULL DEFAULT ''
    ) WITHOUT ROWID""",
    "CREATE INDEX segments_by_tenant ON segments (tenant, expires_at_s)",
    "CREATE INDEX segments_by_expiry ON segments (expires_at_s)",
    # Every ancestor, not parents alone: a cascade then passes a link that was swept meanwhile.
    """CREATE TABLE ancestors (
        ancestor TEXT NOT NULL,
        handle TEXT NOT NULL,
        PRIMARY KEY (ancestor, handle)
    ) WITHOUT ROWID""",
    "CREATE INDEX ancestors_by_handle ON ancestors (handle)",
    """CREATE TABLE received (
        tenant TEXT NOT NULL,
        audience TEXT NOT NULL,
        handle TEXT NOT NULL,
        source TEXT NOT NULL,
        at_s REAL NOT NULL,
        PRIMARY KEY (tenant, audience, handle)
    ) WITHOUT ROWID""",
    "CREATE INDEX received_by_edge ON received (tenant, audience, source, at_s)",
    "CREATE INDEX received_by_time ON received (at_s)",
    *_DRAWS,
    *_FROM_2,
)


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether the file holds nothing yet."""
    (n,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(n == 0 and _marks(connection) == (0, 0))


def check(connection: sqlite3.Connection) -> None:
    """Raises ``ValueError`` unless the file is LCGuard's, of this version or an older one."""
    application, version = _marks(connection)
    if application != APPLICATION_ID:
        raise ValueError("belongs to another program; give the path of LCGuard's own")
    if not 1 <= version <= VERSION:
        raise ValueError(
            f"has schema version {version}, this LCGuard has {VERSION}: use the release that wrote "
            "it, or start a new file"
        )


def prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables of an empty file, or what an older one lacks; within a transaction. Raises
    as ``check``."""
    if is_empty(connection):
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    else:
        check(connection)
        version = _marks(connection)[1]
        for statement in (*(_FROM_1 if version < 2 else ()), *(_FROM_2 if version < 3 else ())):
            connection.execute(statement)
    # Written even where it says so already: a file that takes no writes is found now.
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _marks(connection: sqlite3.Connection) -> tuple[int, int]:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return application, version
