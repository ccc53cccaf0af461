"""The audit trail: whatever is done to the file is found, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcguard.server.audit.chain import Chain, Mark
from lcguard.server.audit.trail import (
    COLUMNS,
    AuditLog,
)
from lcguard.server.audit.verify import verify
from lcguard.server.database.writer import Database, DatabaseError
from tests.server.audit.trails import (
    KEY,
    OTHER,
    TAMPERINGS,
    N,
    entry,
    execute,
    problems,
    raw,
    rows,
    write,
)


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
