"""The audit trail: what is written is there, whole, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcguard.commands.audit import show_command, verify_command
from lcguard.server.audit.trail import (
    COLUMNS,
    REASON_CHARS,
    AuditError,
    AuditLog,
    Entry,
    plain,
    recent,
)
from lcguard.server.audit.verify import verify
from lcguard.server.database.writer import Database
from tests.server.audit.trails import KEY, OTHER, TAMPERINGS, WRITER, entry, execute, problems


@settings(max_examples=30)
@given(st.lists(st.text(max_size=400), min_size=1, max_size=4))
def test_any_text_can_be_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("texts") / "x"
    with Database(path) as database:
        log = AuditLog(database, KEY)
        for text in texts:
            log.append_now(Entry("refused", "blocked", agent=text, reason=text, request_id=text))
    found = verify(path, KEY)
    assert (found.rows, found.problems) == (len(texts), [])


@given(st.text(), st.integers(1, 400))
def test_plain_text(text: str, n: int) -> None:
    found = plain(text, n)
    assert len(found) <= n
    assert found.isprintable()
    assert found.encode() is not None
    assert plain(found, n) == found


def test_entries_are_checked() -> None:
    got = Entry("failed", "error", reason="\x1b[2Ja\r\nb\u202e\u2028c\ud800" + "x" * 999)
    assert got.reason.startswith("[2Ja b c xxx")
    assert len(got.reason) == REASON_CHARS
    with pytest.raises(ValueError, match="event 'consumption' is unknown"):
        Entry("consumption")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verdict 'maybe'"):
        Entry("start", "maybe")  # type: ignore[arg-type]
    for value in (-1, 1.0, True, 2**63):
        with pytest.raises(ValueError, match="n_tokens is"):
            Entry("start", n_tokens=value)  # type: ignore[arg-type]


def test_no_column_for_text_of_prompts() -> None:
    """A new column is a decision: this list is to be changed with it."""
    assert {f.name for f in fields(Entry)} == {
        "at_ms",
        "request_id",
        "event",
        "tenant",
        "agent",
        "source",
        "audience",
        "handle",
        "guard",
        "guard_digest",
        "policy_digest",
        "verdict",
        "reason",
        "n_tokens",
    }


def test_the_clock_stamps(tmp_path: Path) -> None:
    with Database(tmp_path / "x") as database:
        log = AuditLog(database, KEY, clock=lambda: 12.3456)
        assert log.append_now(Entry("start")) == 1
        assert log.append_now(Entry("stop", at_ms=7)) == 2
        assert [row["at_ms"] for row in database.read(recent)] == [12345, 7]


def test_row_and_what_goes_with_it_are_one(tmp_path: Path) -> None:
    with Database(tmp_path / "x") as database:
        database.write_now(lambda c: c.execute("CREATE TABLE words (word TEXT)"))
        log = AuditLog(database, KEY)

        def also(word: str, fail: bool) -> Callable[[sqlite3.Connection], None]:
            def work(connection: sqlite3.Connection) -> None:
                connection.execute("INSERT INTO words VALUES (?)", (word,))
                if fail:
                    raise LookupError(word)

            return work

        assert log.append_now(entry(1), also("kept", False)) == 1
        with pytest.raises(LookupError):
            log.append_now(entry(2), also("undone", True))
        assert log.append_now(entry(3), also("kept too", False)) == 2
        found = database.read(lambda c: c.execute("SELECT word FROM words").fetchall())
        assert found == [("kept",), ("kept too",)]
        # and the other way round: where the row is refused, so is what goes with it
        database.write_now(lambda c: c.execute("DELETE FROM audit WHERE seq = 2"))
        with pytest.raises(AuditError):
            log.append_now(entry(4), also("undone", False))
        assert len(database.read(lambda c: c.execute("SELECT word FROM words").fetchall())) == 2


@pytest.mark.parametrize(
    "name",
    [
        "last deleted",
        "all deleted",
        "head dropped",
        "head count",
        "head count of another type",
        "head hmac",
        "copied to the end",
        "mac of another type",
    ],
)
def test_altered_end_is_not_gone_on_with(path: Path, name: str) -> None:
    statements, _ = TAMPERINGS[name]
    with Database(path) as database:
        log = AuditLog(database, KEY)
        execute(path, *statements)
        with pytest.raises(AuditError, match="the audit trail cannot go on"):
            log.append_now(entry(6))
        with pytest.raises(AuditError, match="the audit trail cannot go on"):
            log.head()
        with pytest.raises(AuditError, match="the audit trail cannot go on"):
            AuditLog(database, KEY)


def test_put_back_while_in_use(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        head = connection.execute("SELECT count, mac, hmac FROM audit_head").fetchone()
    with Database(path) as database:
        log = AuditLog(database, KEY)
        for i in (6, 7):
            log.append_now(entry(i))
        values = dict(zip(("count", "mac", "hmac"), head, strict=True))
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("DELETE FROM audit WHERE seq > 5")
            connection.execute("UPDATE audit_head SET count=:count, mac=:mac, hmac=:hmac", values)
        assert problems(path) == []  # a genuine older state
        with pytest.raises(AuditError, match="put back to a state before row 7"):
            log.append_now(entry(8))


def test_another_key_does_not_go_on(path: Path) -> None:
    with Database(path) as database:
        with pytest.raises(AuditError, match="another key"):
            AuditLog(database, OTHER)
        with pytest.raises(ValueError, match="32 are needed"):
            AuditLog(database, b"short")
    assert problems(path) == []


def test_32_writers_at_once(tmp_path: Path) -> None:
    async def main(log: AuditLog) -> list[int]:
        async def writer(name: int) -> list[int]:
            return [await log.append(Entry("consume", request_id=f"{name}-{i}")) for i in range(8)]

        return [*chain.from_iterable(await asyncio.gather(*map(writer, range(32))))]

    with Database(tmp_path / "x") as database:
        found = asyncio.run(main(AuditLog(database, KEY)))
    assert sorted(found) == list(range(1, 257))
    assert (verify(tmp_path / "x", KEY).rows, problems(tmp_path / "x")) == (256, [])


def test_cancelled_writer_leaves_its_row(tmp_path: Path) -> None:
    async def main(log: AuditLog) -> None:
        hold, held = threading.Event(), threading.Event()
        blocker = asyncio.create_task(log.append(entry(1), lambda _: (held.set(), hold.wait(60))))
        while not held.is_set():
            await asyncio.sleep(0.001)
        task = asyncio.create_task(log.append(entry(2)))
        while not log.database.n_waiting:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hold.set()
        assert await blocker == 1
        assert await log.append(entry(3)) == 3

    with Database(tmp_path / "x") as database:
        asyncio.run(main(AuditLog(database, KEY)))
    assert [row[COLUMNS.index("n_tokens")] for row in named(tmp_path / "x")] == [1, 2, 3]
    assert problems(tmp_path / "x") == []


def named(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT {', '.join(COLUMNS)} FROM audit ORDER BY seq").fetchall()


def test_several_logs_on_one_file(tmp_path: Path) -> None:
    """As several server processes have it: every one continues the others' rows."""
    path = tmp_path / "x"
    databases = [Database(path, busy_timeout_s=60) for _ in range(3)]
    logs = [AuditLog(database, KEY) for database in databases]
    with ThreadPoolExecutor(6) as pool:
        seqs = list(pool.map(lambda i: logs[i % 3].append_now(entry(i)), range(90)))
    for database in databases:
        database.close()
    assert sorted(seqs) == list(range(1, 91))
    assert (verify(path, KEY).rows, problems(path)) == (90, [])


def test_verified_while_written_to(tmp_path: Path) -> None:
    path, stop = tmp_path / "x", threading.Event()
    with Database(path) as database, ThreadPoolExecutor(1) as pool:
        log = AuditLog(database, KEY)

        def work() -> int:
            n = 0
            while not stop.is_set():
                n = log.append_now(entry(n))
            return n

        writer = pool.submit(work)
        try:
            found = [verify(path, KEY)]
            while len(found) < 20 or found[-1].rows < 50:  # it is being written to
                assert not writer.done()
                found.append(verify(path, KEY))
        finally:
            stop.set()
        n = writer.result()
    assert [f.problems for f in found] == [[]] * len(found)
    counts = [f.rows for f in found]
    assert counts == sorted(counts)
    assert counts[-1] <= n


@pytest.mark.slow
def test_killed_writer_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path, wait = tmp_path / "x", random.Random(0)
    acknowledged: dict[int, str] = {}
    for _ in range(3):  # the second and third go on with what a killed one left
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(40 + wait.randrange(60))]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.read().splitlines()
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        whole = [line.split() for line in lines]
        acknowledged |= {int(p[0]): p[1] for p in whole[:-1]}  # the last may be torn
        assert len(whole) >= 40
        found = verify(path, KEY)
        assert found.problems == []
        stored = {row[0]: row[COLUMNS.index("request_id")] for row in named(path)}
        assert acknowledged.items() <= stored.items()
        assert len(stored) == found.rows


def test_verify_command(path: Path) -> None:
    said: list[str] = []
    assert verify_command(path, KEY, say=said.append) == 0
    assert said[0] == f"{path}: 5 rows, whole"
    head = said[1].removeprefix("head ")
    assert verify_command(path, KEY, head, 5, say=said.append) == 0
    execute(path, "DELETE FROM audit WHERE seq = 5")
    said.clear()
    assert verify_command(path, KEY, head, say=said.append) == 1
    assert said[0] == "row 5 missing at the end"
    assert said[-1] == f"{path}: 4 rows, NOT as they were written"
    with pytest.raises(ValueError, match="cannot be opened"):
        verify_command(path.with_name("none"), KEY)
    assert not path.with_name("none").exists()


def test_show_command(path: Path) -> None:
    said: list[str] = []
    show_command(path, last=2, say=said.append)
    assert len(said) == 2
    assert said[1] == (
        "5  2023-11-14T22:13:20+00:00  consume  blocked  acme  agent-5  intake -> billing  "
        "handle-5  gate  req-5  reason 5"
    )
    said.clear()
    show_command(path, tenant="acme", request_id="req-2", as_json=True, say=said.append)
    (line,) = said
    assert json.loads(line)["handle"] == "handle-2"
    for wanted in ({"event": "start"}, {"handle": "handle-6"}, {"tenant": "acm_"}):
        said.clear()
        show_command(path, **wanted, say=said.append)
        assert said == []
    with pytest.raises(ValueError, match="give at least 1"):
        show_command(path, last=0)
    with pytest.raises(ValueError, match="cannot be opened"):
        show_command(path.with_name("none"))


def test_show_command_of_an_altered_file(path: Path) -> None:
    """A reader's terminal is not steered, and a strange type is no crash."""
    execute(
        path,
        "UPDATE audit SET reason = :text, at_ms = 9e300, agent = x'ff' WHERE seq = 5",
        text="\x1b]0;x\x07\nforged line",
    )
    said: list[str] = []
    show_command(path, last=1, say=said.append)
    assert said[0].isprintable()
    show_command(path, last=1, as_json=True, say=said.append)
    assert json.loads(said[1])["seq"] == 5
