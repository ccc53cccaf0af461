"""The audit trail: whatever is done to the file is found, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
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
from lcguard.server.audit.chain import Chain, Mark
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
from lcguard.server.database.writer import Database, DatabaseError

KEY, OTHER = b"k" * 32, b"o" * 32
N = 5
WRITER = """
import sys, threading
from pathlib import Path
from lcguard.server.audit.trail import AuditLog, Entry
from lcguard.server.database.writer import Database
log = AuditLog(Database(Path(sys.argv[1])), b"k" * 32)
def work(name):
    for i in range(10**9):
        seq = log.append_now(Entry("consume", request_id=f"{name}-{i}"))
        sys.stdout.write(f"{seq} {name}-{i}\\n")
        sys.stdout.flush()
for name in range(4):
    threading.Thread(target=work, args=(name,)).start()
"""


def entry(i: int) -> Entry:
    return Entry(
        "consume",
        "blocked",
        tenant="acme",
        agent=f"agent-{i}",
        source="intake",
        audience="billing",
        handle=f"handle-{i}",
        guard="gate",
        guard_digest="g" * 64,
        policy_digest="p" * 64,
        reason=f"reason {i}",
        n_tokens=i,
        request_id=f"req-{i}",
        at_ms=1_700_000_000_000 + i,
    )


def write(path: Path, n: int = N, key: bytes = KEY) -> Mark:
    with Database(path) as database:
        log = AuditLog(database, key)
        for i in range(1, n + 1):
            log.append_now(entry(i))
        return log.head()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "original.sqlite"
    write(path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A trail of five rows, cleanly closed."""
    return Path(shutil.copy(original, tmp_path / "audit.sqlite"))


def execute(path: Path, *statements: str, **values: Any) -> None:
    """What somebody with the file, and without the key, may do."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement, values)


def rows(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM audit ORDER BY seq").fetchall()


def problems(path: Path, **more: Any) -> list[str]:
    return verify(path, KEY, **more).problems


def test_whole_trail(path: Path) -> None:
    found = verify(path, KEY)
    assert (found.rows, found.problems) == (N, [])
    assert found.head == f"{N}:{rows(path)[-1][-1]}"


def test_empty_trail(tmp_path: Path) -> None:
    write(tmp_path / "x", 0)
    found = verify(tmp_path / "x", KEY)
    assert (found.rows, found.head, found.problems) == (0, str(Mark()), [])


def test_chain_is_what_it_says(path: Path) -> None:
    """Computed again from the description, with nothing of the package."""
    import hashlib
    import hmac

    key = hmac.new(KEY, b"lcguard audit key\0", hashlib.sha256).digest()
    before = "0" * 64
    for row in rows(path):
        names = (
            "seq",
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
        )
        text = json.dumps(
            dict(zip(names, row, strict=False)), sort_keys=True, separators=(",", ":")
        )
        message = b"lcguard audit row\0" + before.encode() + text.encode()
        assert hmac.new(key, message, hashlib.sha256).hexdigest() == row[-1]
        before = row[-1]


NEW_VALUES = {
    "at_ms": 1,
    "n_tokens": 99,
    "event": "refused",
    "verdict": "allowed",
    "mac": "0" * 64,
}


@pytest.mark.parametrize("seq", [1, 3, N])
@pytest.mark.parametrize("column", [*COLUMNS[1:], "mac"])
def test_edited_column(path: Path, column: str, seq: int) -> None:
    execute(
        path,
        f"UPDATE audit SET {column} = :new WHERE seq = {seq}",
        new=NEW_VALUES.get(column, "changed"),
    )
    assert problems(path)[0] == f"row {seq}: altered, moved or forged"
    others = problems(path)[1:]
    # Rows that were left alone are not accused, but for the one that a false mac leads into.
    assert len(others) == (column == "mac"), others


def remake(select: str) -> tuple[str, ...]:
    """The same table without its constraints."""
    return (
        f"CREATE TABLE other AS {select}",
        "DROP TABLE audit",
        "ALTER TABLE other RENAME TO audit",
    )


COPY = f"INSERT INTO audit SELECT {{seq}}, {', '.join(COLUMNS[1:])}, mac FROM audit WHERE seq = 2"
TAMPERINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "first deleted": (("DELETE FROM audit WHERE seq = 1",), "row 1 missing"),
    "middle deleted": (("DELETE FROM audit WHERE seq IN (2, 3)",), "rows 2 to 3 missing"),
    "last deleted": (("DELETE FROM audit WHERE seq = 5",), "row 5 missing at the end"),
    "all deleted": (("DELETE FROM audit",), "rows 1 to 5 missing at the end"),
    "deleted and renumbered": (
        ("DELETE FROM audit WHERE seq = 2", "UPDATE audit SET seq = seq - 1 WHERE seq > 2"),
        "row 2: altered",
    ),
    "swapped": (
        (
            "UPDATE audit SET seq = 99 WHERE seq = 2",
            "UPDATE audit SET seq = 2 WHERE seq = 3",
            "UPDATE audit SET seq = 3 WHERE seq = 99",
        ),
        "row 2: altered, moved",
    ),
    "copied to the end": ((COPY.format(seq=6),), "row 6: altered, moved or forged"),
    "copied to the end, head moved": (
        (COPY.format(seq=6), "UPDATE audit_head SET count = 6"),
        "row 6: altered, moved or forged",
    ),
    "copied before the start": ((COPY.format(seq=0),), "row 0: inserted"),
    "copied below zero": ((COPY.format(seq=-7),), "row -7: inserted"),
    "copied beyond a gap": ((COPY.format(seq=9),), "rows 6 to 8 missing"),
    "repeated": (
        remake("SELECT * FROM audit UNION ALL SELECT * FROM audit WHERE seq = 2"),
        "row 2: inserted or repeated",
    ),
    "numbers as text": (
        remake(f"SELECT CAST(seq AS TEXT) AS seq, {', '.join(COLUMNS[1:])}, mac FROM audit"),
        "row '1': inserted",
    ),
    "another type": (("UPDATE audit SET reason = x'00ff' WHERE seq = 2",), "row 2: altered"),
    "no UTF-8": (
        ("UPDATE audit SET reason = CAST(x'ff' AS TEXT) WHERE seq = 2",),
        "row 2: altered",
    ),
    "infinite": (("UPDATE audit SET n_tokens = 9e999 WHERE seq = 2",), "row 2: altered"),
    "mac of another type": (("UPDATE audit SET mac = x'00' WHERE seq = 5",), "row 5: altered"),
    "mac not ASCII": (("UPDATE audit SET mac = 'é' WHERE seq = 2",), "row 2: altered"),
    "head dropped": (("DELETE FROM audit_head",), "head row: missing"),
    "head count": (("UPDATE audit_head SET count = 4",), "head row: altered"),
    "head count of another type": (("UPDATE audit_head SET count = x'05'",), "head row: altered"),
    "head mac": (("UPDATE audit_head SET mac = 'aa'",), "head row: altered"),
    "head hmac": (("UPDATE audit_head SET hmac = mac",), "head row: altered"),
    "two heads": (
        (
            "CREATE TABLE other AS SELECT * FROM audit_head UNION ALL SELECT * FROM audit_head",
            "DROP TABLE audit_head",
            "ALTER TABLE other RENAME TO audit_head",
        ),
        "head row: repeated",
    ),
    "end cut off, head moved": (
        (
            "DELETE FROM audit WHERE seq = 5",
            "UPDATE audit_head SET count = 4, mac = (SELECT mac FROM audit WHERE seq = 4)",
        ),
        "head row: altered",
    ),
    "table dropped": (("DROP TABLE audit",), "no such table"),
    "column dropped": (("ALTER TABLE audit DROP COLUMN reason",), "no such column"),
    "trigger that rewrites": (
        (
            "CREATE TRIGGER t AFTER INSERT ON audit BEGIN DELETE FROM audit WHERE seq = 2; END",
            COPY.format(seq=6),
        ),
        "row 2 missing",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering(path: Path, name: str) -> None:
    statements, expected = TAMPERINGS[name]
    execute(path, *statements)
    found = problems(path)
    assert any(expected in problem for problem in found), found


def test_end_cut_off_under_an_older_head_and_back(path: Path, tmp_path: Path) -> None:
    """The whole file put back is genuine: only what the operator kept elsewhere shows it."""
    older = Path(shutil.copy(path, tmp_path / "older"))
    with Database(path) as database:
        AuditLog(database, KEY).append_now(entry(6))
    kept = verify(path, KEY).head
    assert problems(path, head=kept, at_least=6) == []
    assert problems(older) == []
    (problem,) = problems(older, head=kept)
    assert problem.startswith("row 6 of the kept head missing")
    (problem,) = problems(older, at_least=6)
    assert problem.startswith("5 rows, at least 6 were expected")


def test_kept_head_stays_good_as_the_trail_grows(path: Path) -> None:
    kept = verify(path, KEY).head
    with Database(path) as database:
        AuditLog(database, KEY).append_now(entry(6))
    assert problems(path, head=kept) == []


def test_history_rewritten_with_the_right_key(path: Path, tmp_path: Path) -> None:
    kept = verify(path, KEY).head
    with Database(tmp_path / "new") as database:
        log = AuditLog(database, KEY)
        for i in (1, 2, 33, 4, 5, 6):
            log.append_now(entry(i))
    assert problems(tmp_path / "new") == []
    (problem,) = problems(tmp_path / "new", head=kept)
    assert "row 5: not the one of the kept head" in problem


@pytest.mark.parametrize("text", ["", "5", "5:abc", "-1:" + "0" * 64, "5:" + "A" * 64])
def test_head_that_is_none(path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is not COUNT:MAC"):
        verify(path, KEY, head=text)


def test_forged_with_another_key(tmp_path: Path) -> None:
    write(tmp_path / "x", key=OTHER)
    assert "not made" not in "".join(verify(tmp_path / "x", OTHER).problems)
    found = problems(tmp_path / "x")
    assert found[0].startswith("nothing here was made with this key")
    assert sum("altered, moved or forged" in p for p in found) == N


def test_few_problems_are_shown_of_many(tmp_path: Path) -> None:
    write(tmp_path / "x", 60)
    execute(tmp_path / "x", "UPDATE audit SET reason = 'x'")
    found = problems(tmp_path / "x")
    assert len(found) == 21
    assert found[-1] == "and 40 more"


def test_damaged_pages(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, 200)
    data = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    # Any page of the trail: seek the row's text, so that no free page is hit.
    page = bytes(data).index(b"reason 150") // size
    data[page * size : (page + 1) * size] = b"\xff" * size
    path.write_bytes(data)
    (problem,) = problems(path)
    assert problem.startswith("reading ended after row 1")
    assert "is damaged" in problem


VALUES = st.one_of(
    st.text(max_size=20),
    st.binary(max_size=20),
    st.floats(allow_nan=False),
    st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=150)
@given(seq=st.integers(1, N), column=st.sampled_from([*COLUMNS, "mac"]), value=VALUES)
def test_any_edit_is_found(original: Path, seq: int, column: str, value: object) -> None:
    path = original.with_name("edited.sqlite")
    shutil.copy(original, path)
    try:
        execute(path, f"UPDATE audit SET {column} = :value WHERE seq = {seq}", value=value)
    except (sqlite3.IntegrityError, UnicodeEncodeError):
        return  # SQLite does not take it
    assert bool(problems(path)) is (raw(path) != raw(original))


def raw(path: Path) -> list[tuple[Any, ...]]:
    """Rows with the types that SQLite has stored."""
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = lambda data: ("text", data)
        return connection.execute("SELECT * FROM audit ORDER BY seq").fetchall()


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


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    execute(tmp_path / "x", "CREATE TABLE audit (seq)")
    with pytest.raises(DatabaseError, match="belongs to another program"):
        verify(tmp_path / "x", KEY)


def test_marks_and_chain_take_only_what_they_wrote() -> None:
    mark = Mark(3, "ab" * 32)
    assert Mark.parse(str(mark)) == mark
    own = Chain(KEY)
    assert own.is_head(3, mark.mac, own.head(mark))
    assert not own.is_head(True, mark.mac, own.head(mark))
    assert not own.is_head(3, mark.mac, own.head(Mark(4, mark.mac)))
    assert not own.is_head(3, mark.mac, Chain(OTHER).head(mark))
