"""The file of an SQLite database: whose it is, what is refused, and opened by several."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcguard.server.database import schema
from lcguard.server.database.sqlite_file import SQLITE
from lcguard.server.database.writer import Database, DatabaseError
from tests.server.database.test_database import add, words

# In a process of its own: the limit stays, and concerns every file it writes.
LIMITED = """
import resource, sys
from pathlib import Path
from lcguard.server.database.writer import Database, DatabaseError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    Database(Path(sys.argv[1]))
except DatabaseError as error:
    print(error)
"""


def test_files_are_the_owners_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        with Database(path) as database:
            database.write_now(lambda c: c.execute("CREATE TABLE x (y)"))
            found = {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert found == {path.name + end: 0o600 for end in ("", "-wal", "-shm")}


def test_unwritable_disk_is_found_at_open(path: Path) -> None:
    Database(path).close()  # a whole file, so that only writing to it can fail
    for n_bytes in (0, 4096):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(path), str(n_bytes)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{path}: the disk refuses"), done.stdout


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p.mkdir(), "is not a file"),
        (lambda p: p.write_bytes(b"no database, but long enough" * 100), "is no SQLite database"),
        (lambda p: execute(p, "CREATE TABLE x (y)"), "belongs to another program"),
        (lambda p: execute(p, "PRAGMA user_version = 1"), "belongs to another program"),
        (
            lambda p: (
                Database(p).close(),
                execute(p, f"PRAGMA user_version = {schema.VERSION + 1}"),
            ),
            f"schema version {schema.VERSION + 1}, this LCGuard has {schema.VERSION}",
        ),
    ],
)
def test_files_that_are_refused(path: Path, make: Callable[[Path], object], match: str) -> None:
    make(path)
    content = path.read_bytes() if path.is_file() else b""
    with pytest.raises(DatabaseError, match=match):
        Database(path)
    assert not path.is_file() or path.read_bytes() == content  # and left as they were


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="cannot be made"):
        Database(tmp_path / "none" / "x.sqlite")


def execute(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_a_file_is_seen_before_or_after_it_was_set_up_never_between(path: Path) -> None:
    class Interrupted(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> Any:
            rows = super().execute(sql, *values).fetchall()
            Database(path).close()  # another process, between two statements of this one
            return SimpleNamespace(fetchone=lambda: rows[0])

    looking = sqlite3.connect(path, factory=Interrupted, isolation_level=None)
    assert SQLITE.marks(looking) is None
    assert SQLITE.marks(looking) is not None
    looking.close()


def test_opened_by_many_at_once(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: Database(path), range(8)))
    opened[0].write_now(lambda c: c.execute("CREATE TABLE words (word TEXT UNIQUE)"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: opened[i].write_now(add(str(i))), range(8)))
    assert words(opened[3]) == set("01234567")
    for database in opened:
        database.close()
