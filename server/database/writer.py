"""One database, written by one thread that commits everything waiting at once.

    with Database(Path("lcguard.sqlite")) as database:
        await database.write(lambda connection: connection.execute("INSERT ..."))

A COMMIT costs one wait for the disk however many rows it holds, so requests that come together
share it (group commit). ``write`` returns after it: what was acknowledged survives ``kill -9`` and
a power cut. Several processes may use the same database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.database.place import place_of

T = TypeVar("T")
Work = Callable[[Connection], T]
_IDLE_READERS, _MOST_READERS = 4, 16
"""Connections that are kept, and that there are at a time: a server has few to give."""


logger = logging.getLogger("lcguard.server")


@dataclass
class _Job:
    """One caller's part of a transaction."""

    work: Work[Any]
    done: Future[Any]
    value: Any = None
    error: BaseException | None = None


class Database:
    """Tables of this version that are there and can be written to."""

    def __init__(
        self, where: Path | str, *, busy_timeout_s: float = 2.0, max_waiting: int = 4096
    ) -> None:
        """Opens or makes them.

        Args:
            where: a file, which only its owner may read, or ``postgresql://...``.
            busy_timeout_s: how long another process's lock is waited for.
            max_waiting: transactions that may wait for the writer; above, ``write`` raises.

        Raises:
            DatabaseError: locked, not writable, damaged, another program's or another version's.
        """
        self.where, self.busy_timeout_s, self.max_waiting = where, busy_timeout_s, max_waiting
        self.place = place_of(where, busy_timeout_s)
        self._connection = self.place.writer()
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._readers: deque[Connection] = deque()
        self._reading = threading.BoundedSemaphore(_MOST_READERS)
        self._thread = threading.Thread(target=self._run, name="lcguard-database", daemon=True)
        self._thread.start()

    async def write(self, work: Work[T]) -> T:
        """Runs ``work`` in a transaction, on the writer's thread; returns after the COMMIT.

        ``work`` must not begin or end a transaction. What it raises undoes it alone and is raised
        here. Cancelling the caller takes nothing back: the row is written.

        Raises:
            DatabaseError: locked too long, disk full, file replaced, queue full or closed; nothing
                was written. Or a server that says nothing: it may have been.
        """
        answer = asyncio.wrap_future(self._submit(work))
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait([answer], timeout=self.place.patience_s)
        if not done:
            raise DatabaseError(
                f"{self.place.name}: no answer within {self.place.patience_s:g} s: does it hang?"
            )
        return answer.result()

    def write_now(self, work: Work[T]) -> T:
        """``write`` for callers without an event loop."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("write_now within a write waits for itself: use the connection")
        return self._submit(work).result()

    def post(self, work: Work[object]) -> None:
        """``write`` without waiting, for what nobody is told of; what goes wrong is logged."""
        try:
            self._submit(work).add_done_callback(_log)
        except DatabaseError as error:
            logger.warning("%s", error)

    def read(self, work: Work[T]) -> T:
        """Runs ``work`` on a read-only connection, in one snapshot; for any thread.

        Raises ``DatabaseError`` where the file cannot be read.
        """
        if self._closed:
            raise self._is_closed()
        if not self._reading.acquire(timeout=self.busy_timeout_s):
            raise DatabaseError(
                f"{self.place.name}: {_MOST_READERS} reads take too long: try again"
            )
        try:
            return self._read(work)
        except self.place.error as error:
            if (found := self.place.explained(error)) is None:
                raise
            raise found from error
        finally:
            self._reading.release()

    def _read(self, work: Work[T]) -> T:
        try:
            connection = self._readers.popleft()
        except IndexError:
            connection = self.place.reader()
        try:
            connection = self.place.snapshot(connection)
            try:
                return work(connection)
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        finally:
            self._give_back(connection)

    @property
    def n_waiting(self) -> int:
        """Transactions that wait for the writer."""
        return len(self._waiting)

    def close(self) -> None:
        """Writes what waits, then closes the file. May be called twice."""
        with self._changed:
            self._closed = True
            # The writer last: a read-only connection would leave the rows in the -wal file.
            while self._readers:
                self._readers.popleft().close()
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, work: Work[T]) -> Future[T]:
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        with self._changed:
            if self._closed:
                raise self._is_closed()
            if len(self._waiting) >= self.max_waiting:
                raise DatabaseError(
                    f"{self.place.name}: {self.max_waiting} transactions wait already: send fewer "
                    "requests at a time, or use a faster disk"
                )
            self._waiting.append(_Job(work, done))
            self._changed.notify()
        return done

    def _give_back(self, connection: Connection) -> None:
        with self._changed:
            if not self._closed and len(self._readers) < _IDLE_READERS:
                self._readers.append(connection)
                return
        connection.close()

    def _is_closed(self) -> DatabaseError:
        return DatabaseError(f"{self.place.name}: closed: the server is stopping")

    # The writer's thread.

    def _run(self) -> None:
        while self._wait():
            # The lock first: everything that came while it was waited for shares the COMMIT.
            try:
                self._connection = self.place.begin(self._connection)
            except Exception as error:
                for job in self._take():
                    job.done.set_exception(self._not_written(error))
                continue
            self._commit(self._take())
        self._connection.close()

    def _wait(self) -> bool:
        """Until there is work; False where there is none and will be none."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return False
                self._changed.wait()
            return True

    def _take(self) -> list[_Job]:
        with self._changed:
            jobs = list(self._waiting)
            self._waiting.clear()
            return jobs

    def _commit(self, jobs: list[_Job]) -> None:
        """One transaction for all, each in its own savepoint."""
        try:
            for job in jobs:
                self._one(job)
            self._connection.execute("COMMIT")
        except BaseException as error:  # whatever it is: this thread must go on
            with contextlib.suppress(self.place.error):
                self._connection.execute("ROLLBACK")
            for job in jobs:
                job.done.set_exception(job.error or self._not_written(error))
            return
        for job in jobs:
            if job.error is not None:
                job.done.set_exception(job.error)
            else:
                job.done.set_result(job.value)

    def _one(self, job: _Job) -> None:
        """Raises where the transaction is lost, and with it the other jobs' part."""
        connection = self._connection
        connection.execute("SAVEPOINT job")
        try:
            job.value = job.work(connection)
        except BaseException as error:
            job.error = self.place.explained(error) or error
            if not connection.in_transaction:  # rolled back already: disk full, say
                raise
            connection.execute("ROLLBACK TO job")
        connection.execute("RELEASE job")

    def _not_written(self, error: BaseException) -> DatabaseError:
        found = self.place.explained(error) or error
        if isinstance(found, DatabaseError):
            return DatabaseError(str(found))  # its own for each: tracebacks are added to it
        return DatabaseError(f"{self.place.name}: the transaction was lost ({found}): try again")


def _log(done: Future[Any]) -> None:
    if error := done.exception():
        logger.warning("not written: %s", error)
