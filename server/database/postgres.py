"""A PostgreSQL database that several proxies share.

psycopg rather than asyncpg or SQLAlchemy: the writer is a thread that runs functions of SQL, and
its connection is asked as SQLite's is. Every writing transaction first locks the one row that says
whose the tables are, so that proxies write one after the other as they would in a file: a chain of
HMACs has one end, and what a budget counts is what was booked.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from lcguard.server.database import schema
from lcguard.server.database.connection import Connection, DatabaseError, Rows

_IDLE_S = 5.0
"""A proxy that stands still within a transaction loses it after so long: others wait for it."""
_SILENT_S = 10
"""A server that takes nothing for so long is lost."""
_SCAN_ROWS = 2000
_VALUE = re.compile(r"\?|(?<!:):(\w+)")
_TYPES = (
    (" WITHOUT ROWID", ""),
    ("TEXT", 'TEXT COLLATE "C"'),  # ordered by bytes, as in a file
    ("BLOB", "BYTEA"),
    ("INTEGER", "BIGINT"),
    ("REAL", "DOUBLE PRECISION"),
)


_WAIT_FOR_THE_DISK = (
    "SELECT set_config('synchronous_commit', 'on', false) "
    "WHERE current_setting('synchronous_commit') = 'off'"
)
"""So that what was acknowledged survives a power cut."""
_MARKS = "SELECT application_id, version FROM lcguard_schema"
_WHY: tuple[tuple[type[Exception], str], ...] = (
    (psycopg.errors.DiskFull, "the disk is full: free some space"),
    (psycopg.errors.ReadOnlySqlTransaction, "cannot be written to: name the primary server"),
    (psycopg.errors.InsufficientPrivilege, "access is denied: let this user own the tables"),
    (psycopg.errors.UndefinedTable, "its tables are gone: restore a backup, or restart"),
    # whatever else is no fault of a statement
    (psycopg.OperationalError, "does not serve: is it up, and are name and password right?"),
)


class PostgresConnection:
    """A connection of psycopg, asked as one of SQLite."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.own = connection

    @property
    def in_transaction(self) -> bool:
        status = self.own.info.transaction_status
        return status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)

    def execute(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = (), /) -> Rows:
        return self.own.execute(translated(sql), values)

    def executemany(self, sql: str, values: Iterable[Sequence[Any]], /) -> Rows:
        cursor = self.own.cursor()
        cursor.executemany(translated(sql), values)
        return cursor

    def close(self) -> None:
        self.own.close()


@lru_cache(256)
def translated(sql: str) -> bytes:
    """A statement with the values' places as psycopg wants them."""
    return _VALUE.sub(lambda m: f"%({m[1]})s" if m[1] else "%s", sql).encode()


class PostgresServer:
    """The tables in the first schema of the search path."""

    error: type[Exception] = psycopg.Error

    def __init__(self, url: str, busy_timeout_s: float, password_variable: str) -> None:
        """``password_variable``: of the environment; what is not there libpq looks for itself."""
        self.name, self.busy_timeout_s = url, busy_timeout_s
        self.patience_s: float | None = busy_timeout_s + _IDLE_S
        self._password_variable = password_variable

    def writer(self) -> Connection:
        connection = self._connect(write=True)
        try:
            self._set_up(connection)
        except (psycopg.Error, ValueError) as error:
            connection.close()
            raise self._opening(error) from None
        return connection

    def reader(self) -> Connection:
        connection = self._connect(write=False)
        try:
            schema.check(POSTGRES.marks(connection) or (0, 0))
        except (psycopg.Error, ValueError) as error:
            connection.close()
            raise self._opening(error) from None
        return connection

    def begin(self, connection: Connection) -> Connection:
        return self._begun(connection, write=True)

    def snapshot(self, connection: Connection) -> Connection:
        return self._begun(connection, write=False)

    def scan(self, connection: Connection, sql: str) -> Iterator[Any]:
        assert isinstance(connection, PostgresConnection)
        with connection.own.cursor(name="lcguard_scan") as rows:
            rows.itersize = _SCAN_ROWS
            yield from rows.execute(translated(sql))

    def explained(self, error: BaseException) -> DatabaseError | None:
        if isinstance(error, psycopg.errors.LockNotAvailable):
            return DatabaseError(
                f"{self.name}: other proxies have been writing for {self.busy_timeout_s:g} s: wait "
                "longer, or end the one that stands still"
            )
        for kind, why in _WHY:
            if isinstance(error, kind):
                return DatabaseError(f"{self.name}: {why} ({_line(error)})")
        return None

    def _begun(self, connection: Connection, write: bool) -> Connection:
        try:
            self._begin(connection, write)
        except psycopg.Error:
            assert isinstance(connection, PostgresConnection)
            if not connection.own.closed:
                connection.execute("ROLLBACK")
                raise
            connection = self._connect(write)  # the server was started again, say
            self._begin(connection, write)
        return connection

    def _begin(self, connection: Connection, write: bool) -> None:
        if not write:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            return
        # each statement after the lock sees what others have committed before they gave it up
        connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        marks = connection.execute(f"{_MARKS} FOR UPDATE").fetchone()
        if marks != (schema.APPLICATION_ID, schema.VERSION):
            connection.execute("ROLLBACK")
            raise DatabaseError(
                f"{self.name}: its tables are of another version now: restart with one release"
            )

    def _connect(self, write: bool) -> PostgresConnection:
        password = os.environ.get(self._password_variable) or None
        try:
            connection = PostgresConnection(
                psycopg.connect(
                    self.name,
                    password=password,
                    autocommit=True,
                    connect_timeout=max(2, math.ceil(self.busy_timeout_s)),
                    application_name="lcguard",
                    keepalives_idle=_SILENT_S,
                    tcp_user_timeout=_SILENT_S * 1000,
                )
            )
            for name, value in self._session(write).items():
                connection.execute("SELECT set_config(?, ?, false)", (name, value))
            if write:
                connection.execute(_WAIT_FOR_THE_DISK)
        except psycopg.Error as error:
            raise self._opening(error) from None
        return connection

    def _session(self, write: bool) -> dict[str, str]:
        if not write:
            return {"default_transaction_read_only": "on"}
        return {
            "lock_timeout": f"{math.ceil(self.busy_timeout_s * 1000)}ms",
            "idle_in_transaction_session_timeout": f"{math.ceil(_IDLE_S * 1000)}ms",
        }

    def _set_up(self, connection: Connection) -> None:
        connection.execute("BEGIN")
        try:
            # there may be no row to lock yet
            connection.execute("SELECT pg_advisory_xact_lock(?)", (schema.APPLICATION_ID,))
            schema.prepare(connection, POSTGRES)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _opening(self, error: Exception) -> DatabaseError:
        if isinstance(error, ValueError):
            return DatabaseError(f"{self.name}: {error}")
        return self.explained(error) or DatabaseError(
            f"{self.name}: cannot be used ({_line(error)}): give LCGuard a database of its own"
        )


class _Dialect:
    """The marks stand in a table of one row, which writers lock."""

    def marks(self, connection: Connection) -> tuple[int, int] | None:
        names = {
            name
            for (name,) in connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
            )
        }
        if "lcguard_schema" in names:
            application, version = connection.execute(_MARKS).fetchone() or (0, 0)
            return application, version
        return (0, 0) if names else None

    def mark(self, connection: Connection, application: int, version: int) -> None:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS lcguard_schema "
            "(application_id BIGINT PRIMARY KEY, version BIGINT NOT NULL)"
        )
        connection.execute(
            "INSERT INTO lcguard_schema VALUES (?, ?) "
            "ON CONFLICT (application_id) DO UPDATE SET version = EXCLUDED.version",
            (application, version),
        )

    def ddl(self, statement: str) -> str:
        for ours, theirs in _TYPES:
            statement = statement.replace(ours, theirs)
        return statement


POSTGRES = _Dialect()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
