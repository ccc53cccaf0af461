"""What the tables may lie in, a file or a server, asked in one SQL.

Statements are written for both: ``?`` or ``:name`` for values, ``ON CONFLICT`` for what is there
already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol


class DatabaseError(RuntimeError):
    """The database cannot be used. One line: which one, why, the fix."""


class Rows(Protocol):
    """What a statement gives."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """A part of ``sqlite3.Connection``; every value goes through ``values``."""

    @property
    def in_transaction(self) -> bool: ...

    def execute(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ..., /) -> Rows: ...

    def executemany(self, sql: str, values: Iterable[Sequence[Any]], /) -> Rows: ...

    def close(self) -> None: ...


class Place(Protocol):
    """Where the tables lie."""

    name: str
    """For messages; no secret is in it."""
    error: type[Exception]
    """What the driver raises."""
    patience_s: float | None
    """How long a write may take before nobody waits for it; None: until it ends."""

    def writer(self) -> Connection:
        """A connection that may be handed to one other thread; makes the tables where absent, and
        brings up older ones. Raises ``DatabaseError``."""

    def reader(self) -> Connection:
        """A connection that cannot write. Raises ``DatabaseError``."""

    def begin(self, connection: Connection) -> Connection:
        """Begins a transaction of a writer, alone among all writers of the place. Returns the
        connection, a new one where the old was lost. Raises ``DatabaseError`` or ``error``."""

    def snapshot(self, connection: Connection) -> Connection:
        """Begins a transaction of a reader, which sees one state; otherwise as ``begin``."""

    def scan(self, connection: Connection, sql: str) -> Iterator[Any]:
        """The rows of a long table exactly as they lie there, never all of them in memory."""

    def explained(self, error: BaseException) -> DatabaseError | None:
        """What ``error`` says of the place; None where it is about a statement, or not its own."""
