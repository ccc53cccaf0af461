"""The SQLite file: what was acknowledged is there, what failed is not, nothing hangs."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lcguard.server.database.writer import Database, DatabaseError

LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with Database(path, busy_timeout_s=0.3, max_waiting=8) as opened:
        opened.write_now(lambda c: c.execute("CREATE TABLE words (word TEXT UNIQUE)"))
        yield opened


def add(word: str) -> Callable[[sqlite3.Connection], int]:
    return lambda c: c.execute("INSERT INTO words VALUES (?)", (word,)).rowcount


def words(database: Database) -> set[str]:
    return {w for (w,) in database.read(lambda c: c.execute("SELECT * FROM words").fetchall())}


class Blocked:
    """Holds the writer within a transaction, so that what comes next has to wait together."""

    def __init__(self, database: Database) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=database.write_now, args=(self._work,))

    def _work(self, connection: sqlite3.Connection) -> None:
        self.started.set()
        assert self.go_on.wait(60)

    def __enter__(self) -> Blocked:
        self.thread.start()
        assert self.started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.join()


def test_commit_waits_for_the_disk(database: Database) -> None:
    def look(connection: sqlite3.Connection) -> tuple[str, int]:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
        return mode, synchronous

    assert database.write_now(look) == ("wal", 2)


def test_waiting_transactions_share_a_commit(database: Database) -> None:
    seen: list[str] = []
    database.write_now(lambda c: c.set_trace_callback(seen.append))

    async def main() -> None:
        with Blocked(database):
            tasks = [asyncio.create_task(database.write(add(str(i)))) for i in range(6)]
            while database.n_waiting < 6:
                await asyncio.sleep(0.001)
            seen.clear()
        assert await asyncio.gather(*tasks) == [1] * 6

    asyncio.run(main())
    database.write_now(lambda c: c.set_trace_callback(None))
    after = seen[seen.index("COMMIT") + 1 :]  # the first is the blocker's own
    assert after.count("COMMIT") == 1
    assert sum("INSERT" in s for s in after) == 6
    assert words(database) == set("012345")


def test_one_that_fails_undoes_itself_alone(database: Database) -> None:
    def half(connection: sqlite3.Connection) -> None:
        add("half")(connection)
        raise LookupError("no")

    async def main() -> list[object]:
        with Blocked(database):
            works = (add("a"), half, add("a"), add("b"))
            tasks = [asyncio.create_task(database.write(w)) for w in works]
            while database.n_waiting < len(tasks):
                await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, lookup, unique, last = asyncio.run(main())
    assert (first, last) == (1, 1)
    assert isinstance(lookup, LookupError)
    assert isinstance(unique, sqlite3.IntegrityError)
    assert words(database) == {"a", "b"}


@pytest.mark.parametrize("ending", ["ROLLBACK", "ROLLBACK; BEGIN"])
def test_a_lost_transaction_fails_all_of_it(database: Database, ending: str) -> None:
    def lose(connection: sqlite3.Connection) -> None:
        for statement in ending.split("; "):
            connection.execute(statement)

    async def main() -> list[object]:
        with Blocked(database):
            works = (add("a"), lose, add("b"))
            tasks = [asyncio.create_task(database.write(w)) for w in works]
            while database.n_waiting < 3:
                await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(main())
    assert all(isinstance(f, DatabaseError) for f in found), found
    assert words(database) == set()
    assert database.write_now(add("c")) == 1
    assert words(database) == {"c"}


def test_lock_of_another_process(database: Database, path: Path) -> None:
    locker = subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert locker.stdout is not None
        assert locker.stdout.readline() == "locked\n"
        # it gives up, rather than wait for the lock, which is held until the end
        with pytest.raises(DatabaseError, match=r"locked by another process for 0\.3 s"):
            database.write_now(add("a"))
        with pytest.raises(DatabaseError, match="locked"):
            Database(path, busy_timeout_s=0.1)
        assert words(database) == set()
    finally:
        locker.communicate()
    assert locker.returncode == 0
    assert database.write_now(add("b")) == 1
    assert words(database) == {"b"}


def test_full_queue(database: Database) -> None:
    async def main() -> None:
        with Blocked(database):
            tasks = [asyncio.create_task(database.write(add(str(i)))) for i in range(8)]
            while database.n_waiting < 8:
                await asyncio.sleep(0.001)
            with pytest.raises(DatabaseError, match="8 transactions wait already"):
                await database.write(add("too many"))
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert words(database) == set("01234567")


def test_cancelled_writers_lose_no_row(database: Database) -> None:
    async def main() -> None:
        with Blocked(database):
            tasks = [asyncio.create_task(database.write(add(str(i)))) for i in range(4)]
            while database.n_waiting < 4:
                await asyncio.sleep(0.001)
            for task in tasks[:3]:
                task.cancel()
            found = await asyncio.gather(*tasks[:3], return_exceptions=True)
            assert all(isinstance(f, asyncio.CancelledError) for f in found)
        assert await asyncio.wait_for(tasks[3], 60) == 1  # the writer still lives

    asyncio.run(main())
    assert words(database) == set("0123")
    assert database.write_now(add("next")) == 1


def test_event_loop_that_ended(database: Database) -> None:
    async def main() -> None:
        asyncio.get_running_loop().create_task(database.write(add("left behind")))
        while not database.n_waiting:
            await asyncio.sleep(0)

    with Blocked(database):
        asyncio.run(main())
    assert database.write_now(add("next")) == 1
    assert words(database) == {"left behind", "next"}


def test_full_disk(database: Database) -> None:
    def limit(n_more: int) -> Callable[[sqlite3.Connection], None]:
        def work(connection: sqlite3.Connection) -> None:
            (n,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {n + n_more}")

        return work

    database.write_now(limit(2))

    async def main() -> list[object]:
        with Blocked(database):
            works = (add("small"), add("x" * 100_000), add("tiny"))
            tasks = [asyncio.create_task(database.write(w)) for w in works]
            while database.n_waiting < 3:
                await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(main())
    assert isinstance(found[1], DatabaseError)
    assert "disk is full" in str(found[1])
    kept = {w for w, f in zip(("small", "", "tiny"), found, strict=True) if f == 1}
    assert words(database) == kept  # acknowledged is stored, refused is not
    database.write_now(limit(1000))
    assert database.write_now(add("x" * 100_000)) == 1


def test_file_replaced_while_in_use(database: Database, path: Path) -> None:
    path.rename(path.with_name("moved"))
    with pytest.raises(DatabaseError, match="moved, deleted or replaced"):
        database.write_now(add("a"))
    path.write_bytes(b"")
    with pytest.raises(DatabaseError, match="moved, deleted or replaced"):
        database.write_now(add("a"))
    path.with_name("moved").replace(path)
    assert database.write_now(add("a")) == 1


def test_reads_see_whole_transactions_only(database: Database) -> None:
    """Each transaction writes two words, so a reader counts an even number, whenever it looks."""
    stop = threading.Event()

    def look() -> list[int]:
        counts = []
        while not stop.is_set() or not counts:
            counts.append(
                database.read(lambda c: c.execute("SELECT count(*) FROM words").fetchone()[0])
            )
        return counts

    def pair(i: int) -> Callable[[sqlite3.Connection], object]:
        return lambda c: (add(f"{i} a")(c), time.sleep(0.001), add(f"{i} b")(c))

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(look) for _ in range(6)]  # more than connections are kept
        for i in range(40):
            database.write_now(pair(i))
        stop.set()
        found = [reader.result() for reader in readers]
    assert all(n % 2 == 0 for counts in found for n in counts)
    assert all(counts == sorted(counts) for counts in found)
    assert len(words(database)) == 80


def test_a_read_is_one_snapshot(database: Database) -> None:
    def look(connection: sqlite3.Connection) -> list[int]:
        counts = []
        for word in "ab":
            counts += connection.execute("SELECT count(*) FROM words").fetchone()
            database.write_now(add(word))
        return counts

    assert database.read(look) == [0, 0]
    assert words(database) == {"a", "b"}


def test_readers_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseError, match="cannot be written to"):
        database.read(add("a"))
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        database.read(lambda c: c.execute("SELECT * FROM nowhere"))
    assert words(database) == set()


def test_close_writes_what_waits(path: Path) -> None:
    database = Database(path)
    database.write_now(lambda c: c.execute("CREATE TABLE words (word TEXT UNIQUE)"))
    with ThreadPoolExecutor(5) as pool:
        with Blocked(database):
            writers = [pool.submit(database.write_now, add(str(i))) for i in range(4)]
            while database.n_waiting < 4:
                time.sleep(0.001)
            closing = pool.submit(database.close)
        closing.result()
        assert [w.result() for w in writers] == [1] * 4
    for use in (database.write_now, database.read):
        with pytest.raises(DatabaseError, match="closed"):
            use(add("late"))
    database.close()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # all in one file
    with Database(path) as again:
        assert words(again) == set("0123")


def test_write_within_a_write_does_not_hang(database: Database) -> None:
    with pytest.raises(RuntimeError, match="use the connection"):
        database.write_now(lambda c: database.write_now(add("inner")))
