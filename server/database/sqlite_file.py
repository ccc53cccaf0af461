"""Opens the SQLite file, and says in one line why it cannot be used."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lcguard.server.database import schema

_WAL_BYTES = 64 * 2**20


class DatabaseError(RuntimeError):
    """The database cannot be used. One line: which file, why, the fix."""


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


def storage_error(path: Path, error: sqlite3.Error, waited_s: float) -> DatabaseError | None:
    """What ``error`` says of the file; None where it is about a statement."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
    if code in _LOCKED:
        return DatabaseError(
            f"{path}: locked by another process for {waited_s:g} s: end that process or wait longer"
        )
    why = _WHY.get(code)
    return None if why is None else DatabaseError(f"{path}: {why} ({error})")


def open_writer(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """A connection that may be handed to one other thread; makes file and tables where absent.

    Raises ``DatabaseError`` where the file cannot be written to.
    """
    _create(path)
    connection = _connect(path, "rw", busy_timeout_s)
    try:
        _retry(lambda: _set_up(connection), busy_timeout_s)
    except sqlite3.Error as error:
        connection.close()
        raise _opening(path, error, busy_timeout_s) from None
    except ValueError as error:
        connection.close()
        raise DatabaseError(f"{path}: {error}") from None
    return connection


def open_reader(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """A read-only connection. Raises ``DatabaseError``."""
    connection = _connect(path, "ro", busy_timeout_s)
    try:
        # Functions in the schema of a file that someone altered stay unused.
        connection.execute("PRAGMA trusted_schema = OFF")
        schema.check(connection)
    except sqlite3.Error as error:
        connection.close()
        raise _opening(path, error, busy_timeout_s) from None
    except ValueError as error:
        connection.close()
        raise DatabaseError(f"{path}: {error}") from None
    return connection


@contextmanager
def reading(path: Path, waited_s: float = 0.0) -> Iterator[None]:
    """Turns what SQLite says of the file within the block into ``DatabaseError``."""
    try:
        yield
    except sqlite3.Error as error:
        raise _opening(path, error, waited_s) from None


def identity(path: Path) -> tuple[int, int]:
    """Tells a file from another one put in its place. Raises ``OSError``."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


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


def _connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"  # never creates a file with another mode
    try:
        return sqlite3.connect(
            uri, uri=True, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise _opening(path, error, busy_timeout_s) from None


def _set_up(connection: sqlite3.Connection) -> None:
    if not schema.is_empty(connection):
        schema.check(connection)  # before anything of another program's file is changed
    connection.execute("PRAGMA trusted_schema = OFF")
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ValueError(f"journal mode is {mode}, not WAL: put it on a local disk")
    # FULL: COMMIT waits for the disk, so that what was acknowledged survives a power cut.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        schema.prepare(connection)
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


def _opening(path: Path, error: sqlite3.Error, waited_s: float) -> DatabaseError:
    return storage_error(path, error, waited_s) or DatabaseError(
        f"{path}: cannot be used ({error}): give another path, or restore a backup"
    )
