"""A SQLite file, the default: opens it, and says in one line why it cannot be used."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lcguard.server.database import schema
from lcguard.server.database.connection import Connection, DatabaseError

_WAL_BYTES = 64 * 2**20

_WHY = {
    sqlite3.SQLITE_FULL: "the disk is full: free some space",
    sqlite3.SQLITE_READONLY: "cannot be written to: let the server's user write the file and its "
    "folder",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: check that file and folder exist and that the "
    "server's user may use them",
    sqlite3.SQLITE_NOTADB: "is no SQLite database: give another path, or restore a backup",
    sqlite3.SQLITE_CORRUPT: "is damaged: keep a copy and restore a backup",
    sqlite3.SQLITE_IOERR: "the disk refuses: check it and its free space",
    sqlite3.SQLITE_NOMEM: "no memory left: give the server more",
    sqlite3.SQLITE_PERM: "access is denied: let the server's user read and write it",
    sqlite3.SQLITE_PROTOCOL: "its locks do not work: put it on a local disk",
}
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class SqliteFile:
    """One file, which several processes of one machine may use."""

    error: type[Exception] = sqlite3.Error
    patience_s: float | None = None

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self.path, self.name, self.busy_timeout_s = path, str(path), busy_timeout_s
        self._identity: tuple[int, int] | None = None

    def writer(self) -> Connection:
        _create(self.path)
        connection = self._connect("rw")
        try:
            _retry(lambda: _set_up(connection), self.busy_timeout_s)
        except (sqlite3.Error, ValueError) as error:
            connection.close()
            raise self._opening(error) from None
        self._identity = _identity(self.path)
        return connection

    def reader(self) -> Connection:
        connection = self._connect("ro")
        connection.text_factory = _exact
        try:
            # Functions in the schema of a file that someone altered stay unused.
            connection.execute("PRAGMA trusted_schema = OFF")
            schema.check(SQLITE.marks(connection) or (0, 0))
        except (sqlite3.Error, ValueError) as error:
            connection.close()
            raise self._opening(error) from None
        return connection

    def begin(self, connection: Connection) -> Connection:
        try:
            same = _identity(self.path) == self._identity
        except OSError:
            same = False
        if not same:  # rows would go into a file that nobody finds again
            raise DatabaseError(
                f"{self.path}: moved, deleted or replaced while in use: restart the server"
            )
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def snapshot(self, connection: Connection) -> Connection:
        connection.execute("BEGIN")
        return connection

    def scan(self, connection: Connection, sql: str) -> Iterator[Any]:
        return iter(connection.execute(sql))

    def explained(self, error: BaseException) -> DatabaseError | None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
        if code in _LOCKED:
            return DatabaseError(
                f"{self.path}: locked by another process for {self.busy_timeout_s:g} s: end that "
                "process or wait longer"
            )
        why = _WHY.get(code)
        return None if why is None else DatabaseError(f"{self.path}: {why} ({error})")

    def _connect(self, mode: str) -> sqlite3.Connection:
        # never creates a file with another mode
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            return sqlite3.connect(
                uri,
                uri=True,
                timeout=self.busy_timeout_s,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise self._opening(error) from None

    def _opening(self, error: Exception) -> DatabaseError:
        if isinstance(error, ValueError):
            return DatabaseError(f"{self.path}: {error}")
        return self.explained(error) or DatabaseError(
            f"{self.path}: cannot be used ({error}): give another path, or restore a backup"
        )


class _Dialect:
    """The marks stand in the file's header."""

    def marks(self, connection: Connection) -> tuple[int, int] | None:
        # One statement is one snapshot: with three of them a process that sets the file up
        # meanwhile is seen by half, and its file taken for another program's.
        n, application, version = connection.execute(
            "SELECT (SELECT count(*) FROM sqlite_master), application_id, user_version"
            " FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        return (application, version) if n or application or version else None

    def mark(self, connection: Connection, application: int, version: int) -> None:
        connection.execute(f"PRAGMA application_id = {application}")
        connection.execute(f"PRAGMA user_version = {version}")

    def ddl(self, statement: str) -> str:
        return statement


SQLITE = _Dialect()


def _identity(path: Path) -> tuple[int, int]:
    """Tells a file from another one put in its place. Raises ``OSError``."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _exact(data: bytes) -> str:
    """Bytes that are no UTF-8 stay apart from any text: they are altered, not an error."""
    return data.decode("utf-8", "surrogateescape")


def _create(path: Path) -> None:
    """An empty file that only its owner may read; SQLite gives its side files the same mode."""
    try:
        # Only ever a new file: closing a descriptor of one in use would drop SQLite's locks on it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        if not path.is_file():
            raise DatabaseError(f"{path}: is not a file: give the path of one") from None
    except OSError as error:
        raise DatabaseError(
            f"{path}: cannot be made ({error.strerror}): give a path in a folder that exists and "
            "that the server's user may write"
        ) from None


def _set_up(connection: sqlite3.Connection) -> None:
    if (marks := SQLITE.marks(connection)) is not None:
        schema.check(marks)  # before anything of another program's file is changed
    connection.execute("PRAGMA trusted_schema = OFF")
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ValueError(f"journal mode is {mode}, not WAL: put it on a local disk")
    # FULL: COMMIT waits for the disk, so that what was acknowledged survives a power cut.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        schema.prepare(connection, SQLITE)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _retry(attempt: Callable[[], None], busy_timeout_s: float) -> None:
    """SQLite does not wait by itself where two processes switch a new file to WAL at once."""
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            locked = getattr(error, "sqlite_errorcode", 0) & 0xFF in _LOCKED
            if not locked or time.monotonic() >= deadline:
                raise
        time.sleep(0.01)
