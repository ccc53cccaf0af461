"""PostgreSQL as the database: writers one after the other, lost connections, and whose tables."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from lcguard.cli import app
from lcguard.commands.serve import load_settings
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.server.audit.trail import AuditLog, Entry, recent
from lcguard.server.audit.verify import verify
from lcguard.server.database import schema
from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.database.place import PASSWORD_VARIABLE, place_of
from lcguard.server.database.postgres import translated
from lcguard.server.database.writer import Database
from tests.server.postgres import Server

pytest_plugins = ("tests.server.databases",)

KEY = b"k" * 32
FROM_3 = ("DROP TABLE edges", "DROP TABLE accounts", "UPDATE lcguard_schema SET version = 3")


@pytest.fixture
def url(postgres: Server) -> str:
    return postgres.empty()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with Database(url, busy_timeout_s=0.3) as opened:
        opened.write_now(lambda c: c.execute("CREATE TABLE words (word TEXT UNIQUE)"))
        yield opened


def add(word: str) -> Callable[[Connection], int]:
    return lambda c: c.execute("INSERT INTO words VALUES (?)", (word,)).rowcount


def words(database: Database) -> set[str]:
    return {w for (w,) in database.read(lambda c: c.execute("SELECT * FROM words").fetchall())}


def execute(postgres: Server, url: str, *statements: str) -> None:
    """What somebody with the tables, and without the key, may do."""
    with postgres.connect(url) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def test_values_go_where_sqlite_has_them() -> None:
    assert translated("a = ? AND b = :name") == b"a = %s AND b = %(name)s"


def test_two_trails_grow_into_one_chain(url: str) -> None:
    with Database(url) as one, Database(url) as other:
        logs = [AuditLog(database, KEY) for database in (one, other)]

        async def main() -> list[int]:
            rows = [logs[i % 2].append(Entry("consume", request_id=str(i))) for i in range(40)]
            return await asyncio.gather(*rows)

        found = asyncio.run(main())
        assert sorted(found) == list(range(1, 41))
        assert logs[0].head() == logs[1].head()
        assert {row["request_id"] for row in one.read(recent)} == {str(i) for i in range(40)}
    whole = verify(url, KEY)
    assert (whole.rows, whole.problems) == (40, [])


def test_the_audit_commands_read_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    (tmp_path / "server.yaml").write_text(json.dumps({"database": url}))
    with Database(url) as database:
        AuditLog(database, KEY).append_now(Entry("consume", tenant="acme", request_id="r-1"))
    said = [
        CliRunner().invoke(app, ["audit", *words, "--dir", str(tmp_path)])
        for words in (["verify"], ["show", "--tenant", "acme"], ["show", "--tenant", "other"])
    ]
    assert [s.exit_code for s in said] == [0, 0, 0], said
    assert "1 rows, whole" in said[0].output
    assert "r-1" in said[1].output
    assert said[2].output == ""


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (("DELETE FROM audit WHERE seq = 2",), "row 2 missing"),
        (("DELETE FROM audit WHERE seq = 3",), "row 3 missing at the end"),
        (("UPDATE audit SET tenant = 'x' WHERE seq = 2",), "row 2: altered"),
        (
            (
                "DELETE FROM audit WHERE seq = 3",
                "UPDATE audit_head SET count = 2, mac = (SELECT mac FROM audit WHERE seq = 2)",
            ),
            "head row: altered",
        ),
        (("DELETE FROM audit_head",), "head row: missing"),
        (("ALTER TABLE audit ALTER seq TYPE TEXT",), "row '1': inserted"),
        (("DROP TABLE audit",), "reading ended after row 0"),
    ],
)
def test_an_altered_trail_shows(
    postgres: Server, url: str, statements: tuple[str, ...], problem: str
) -> None:
    with Database(url) as database:
        log = AuditLog(database, KEY)
        for i in range(3):
            log.append_now(Entry("consume", request_id=str(i)))
    execute(postgres, url, *statements)
    assert problem in " ".join(verify(url, KEY).problems)


def test_one_that_fails_undoes_itself_alone(database: Database) -> None:
    def half(connection: Connection) -> None:
        add("half")(connection)
        raise LookupError("no")

    async def main() -> list[object]:
        works = (add("a"), half, add("a"), add("b"))
        return await asyncio.gather(*map(database.write, works), return_exceptions=True)

    first, lookup, unique, last = asyncio.run(main())
    assert (first, last) == (1, 1)
    assert isinstance(lookup, LookupError)
    assert isinstance(unique, psycopg.errors.UniqueViolation)
    assert words(database) == {"a", "b"}


@pytest.mark.parametrize("ending", ["ROLLBACK", "ROLLBACK; BEGIN"])
def test_a_lost_transaction_is_not_acknowledged(database: Database, ending: str) -> None:
    def lose(connection: Connection) -> None:
        add("a")(connection)
        for statement in ending.split("; "):
            connection.execute(statement)

    with pytest.raises(DatabaseError):
        database.write_now(lose)
    assert words(database) == set()
    assert database.write_now(add("c")) == 1
    assert words(database) == {"c"}


def test_a_writer_that_stands_still_is_waited_for_and_then_lost(
    database: Database, url: str
) -> None:
    place = place_of(url, 0.3)
    still = place.begin(place.writer())
    with pytest.raises(DatabaseError, match=r"have been writing for 0\.3 s"):
        database.write_now(add("a"))
    assert words(database) == set()  # who reads waits for nobody
    while not words(database):  # the server ends it after a while
        with suppress(DatabaseError):
            database.write_now(add("b"))
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
        still.execute("SELECT 1")
    assert words(database) == {"b"}
    again = place.begin(still)  # and goes on, on another connection
    assert again is not still
    again.close()


def test_a_server_that_says_nothing_is_not_waited_for(database: Database) -> None:
    pid = database.write_now(lambda c: c.execute("SELECT pg_backend_pid()").fetchone()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(DatabaseError, match="no answer within"):
            asyncio.run(database.write(add("a")))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert database.write_now(add("b")) == 1  # behind the first, which came about after all
    assert words(database) == {"a", "b"}


def test_a_server_that_was_started_again(database: Database, postgres: Server) -> None:
    database.write_now(add("a"))
    assert words(database) == {"a"}
    postgres.stop()
    try:
        for use in (lambda: database.write_now(add("b")), lambda: words(database)):
            with pytest.raises(DatabaseError, match="does not serve"):
                use()
    finally:
        postgres.start()
    assert database.write_now(add("c")) == 1
    assert words(database) == {"a", "c"}


def test_readers_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseError, match="cannot be written to"):
        database.read(add("a"))
    with pytest.raises(psycopg.ProgrammingError, match="does not exist"):
        database.read(lambda c: c.execute("SELECT nothing FROM words"))
    assert words(database) == set()


def test_a_read_is_one_snapshot(database: Database) -> None:
    def look(connection: Connection) -> list[int]:
        counts = []
        for word in "ab":
            counts += connection.execute("SELECT count(*) FROM words").fetchone()
            database.write_now(add(word))
        return counts

    assert database.read(look) == [0, 0]
    assert words(database) == {"a", "b"}


def test_opened_by_many_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda _: Database(url), range(6)))
        logs = [AuditLog(database, KEY) for database in opened]
        list(pool.map(lambda log: log.append_now(Entry("start")), logs))
    assert verify(url, KEY).rows == 6
    for database in opened:
        database.close()


def test_tables_of_the_version_before_are_brought_up(postgres: Server, url: str) -> None:
    Database(url).close()
    execute(postgres, url, *FROM_3)
    assert verify(url, KEY).problems == ["head row: missing"]  # as it is, without a change
    with Database(url) as database:
        assert database.read(lambda c: c.execute("SELECT * FROM edges").fetchall()) == []


@pytest.mark.parametrize(
    ("statements", "match"),
    [
        (("CREATE TABLE x (y INT)",), "belongs to another program"),
        (("CREATE TABLE lcguard_schema (application_id INT, version INT)",), "another program"),
        (
            (
                "CREATE TABLE lcguard_schema (application_id BIGINT, version BIGINT)",
                f"INSERT INTO lcguard_schema VALUES ({schema.APPLICATION_ID}, 99)",
            ),
            "schema version 99",
        ),
    ],
)
def test_tables_that_are_refused(
    postgres: Server, url: str, statements: tuple[str, ...], match: str
) -> None:
    execute(postgres, url, *statements)
    with pytest.raises(DatabaseError, match=match):
        Database(url)


def test_a_newer_release_stops_the_older(database: Database, postgres: Server, url: str) -> None:
    execute(postgres, url, "UPDATE lcguard_schema SET version = 99")
    with pytest.raises(DatabaseError, match="of another version now"):
        database.write_now(add("a"))


def test_a_wrong_password_is_said_and_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "quite-wrong")
    with pytest.raises(DatabaseError, match="name and password") as caught:
        Database(url)
    assert "quite-wrong" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "database", ["postgresql://me:quite-secret@db/x", "postgres://db/x?password=quite-secret"]
)
def test_an_address_with_a_password_is_refused(tmp_path: Path, database: str) -> None:
    with pytest.raises(ValueError, match=PASSWORD_VARIABLE) as caught:
        load_settings(tmp_path, None, [f"database={database}"], None)
    assert "quite-secret" not in str(caught.value)


def test_settings_show_where_and_never_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "quite-secret")
    settings = load_settings(tmp_path, None, ["database=postgresql://me@db/x"], None)
    assert settings.database == "postgresql://me@db/x"
    assert not re.search("quite-secret", repr(settings) + repr(place_of(settings.database, 1)))
    assert load_settings(tmp_path, None, [], None).database == str(tmp_path / "lcguard.sqlite")
    assert os.environ[PASSWORD_VARIABLE] == "quite-secret"
