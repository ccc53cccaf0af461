"""Tables of the proxy's one database: the audit trail, the ledger, what canaries found, what keys
have spent, and the values behind placeholders of text."""

from __future__ import annotations

from typing import Protocol

from lcguard.server.database.connection import Connection

VERSION = 4
"""Older tables are brought up to it; no newer ones are used."""
APPLICATION_ID = 0x4C434744
""""LCGD": tells the tables from another program's."""


class Dialect(Protocol):
    """How one kind of database keeps whose its tables are, and what it calls its types."""

    def marks(self, connection: Connection) -> tuple[int, int] | None:
        """Application and version; None where there is nothing yet."""

    def mark(self, connection: Connection, application: int, version: int) -> None:
        """Keeps them."""

    def ddl(self, statement: str) -> str:
        """A statement of this file."""


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
_FROM_3 = (
    """CREATE TABLE edges (
        tenant TEXT NOT NULL,
        source TEXT NOT NULL,
        audience TEXT NOT NULL,
        state TEXT NOT NULL,
        screened TEXT NOT NULL,
        PRIMARY KEY (tenant, source, audience)
    ) WITHOUT ROWID""",
    """CREATE TABLE accounts (
        key_id TEXT PRIMARY KEY,
        spent TEXT NOT NULL,
        idle_from_s REAL NOT NULL
    ) WITHOUT ROWID""",
)
_STEPS = ((1, _FROM_1), (2, _FROM_2), (3, _FROM_3))
"""What the tables of a version lack of the next."""
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
    *_FROM_3,
)


def check(marks: tuple[int, int]) -> None:
    """Raises ``ValueError`` unless the tables are LCGuard's, of this version or an older one."""
    application, version = marks
    if application != APPLICATION_ID:
        raise ValueError("belongs to another program; give the place of LCGuard's own")
    if not 1 <= version <= VERSION:
        raise ValueError(
            f"has schema version {version}, this LCGuard has {VERSION}: use the release that wrote "
            "it, or start a new one"
        )


def prepare(connection: Connection, dialect: Dialect) -> None:
    """Makes the tables where there are none, or what older ones lack; within a transaction. Raises
    as ``check``."""
    marks = dialect.marks(connection)
    wanted: tuple[str, ...] = _TABLES
    if marks is not None:
        check(marks)
        wanted = tuple(s for before, step in _STEPS for s in step if marks[1] <= before)
    for statement in wanted:
        connection.execute(dialect.ddl(statement))
    # Written even where it says so already: what takes no writes is found now.
    dialect.mark(connection, APPLICATION_ID, VERSION)
