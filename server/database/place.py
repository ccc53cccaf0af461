"""Which database the settings mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from lcguard.server.database.connection import Connection, DatabaseError, Place
from lcguard.server.database.sqlite_file import SqliteFile

PASSWORD_VARIABLE = "LCGUARD_DATABASE_PASSWORD"


def is_server(where: str | Path) -> bool:
    """Whether it is the address of a server, and no path."""
    return str(where).startswith(("postgresql://", "postgres://"))


def check_address(where: str) -> None:
    """Raises ``ValueError`` for a server's address with a password in it: settings are shown."""
    parts = urlsplit(where)
    if parts.password is not None or "password" in parse_qs(parts.query):
        raise ValueError(
            f"database: the address has a password in it: leave it out and set {PASSWORD_VARIABLE},"
            " or name a file with ?passfile=/path"
        )


def place_of(where: str | Path, busy_timeout_s: float) -> Place:
    """The file or the server; nothing is opened.

    Raises ``ValueError`` for an address with a password, ``DatabaseError`` without the driver.
    """
    if not is_server(where):
        return SqliteFile(Path(where), busy_timeout_s)
    check_address(str(where))
    try:
        from lcguard.server.database.postgres import PostgresServer
    except ImportError:
        raise DatabaseError(
            f"{where}: its driver is missing: pip install 'lcguard[postgres]'"
        ) from None
    return PostgresServer(str(where), busy_timeout_s, PASSWORD_VARIABLE)


@contextmanager
def reading(place: Place) -> Iterator[Connection]:
    """A reader of one state, closed at the end. Raises ``DatabaseError`` for what the driver
    raises within."""
    connection = place.reader()
    try:
        connection = place.snapshot(connection)
        yield connection
    except place.error as error:
        raise place.explained(error) or DatabaseError(
            f"{place.name}: cannot be used ({error}): give another, or restore a backup"
        ) from None
    finally:
        connection.close()
