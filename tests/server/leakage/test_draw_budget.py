"""How many draws of one record an audience gets, and which texts are one record."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcguard.server.database import schema
from lcguard.server.database.connection import Connection
from lcguard.server.database.place import place_of
from lcguard.server.database.writer import Database
from lcguard.server.leakage.draw_budget import (
    KEEP_TEXTS,
    DrawsSpent,
    Text,
    record_of,
    reserve_draw,
    sweep_draws,
    text_of,
)
from lcguard.server.leakage.ledger import KEEP_RECEIVED_S, Segment, find, record_segment

KEY, NOW = bytes(range(32)), 1_700_000_000.0
NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."


pytest_plugins = ("tests.server.databases",)


@pytest.fixture
def connection(where: Path | str) -> Iterator[Connection]:
    made = place_of(where, 2.0).writer()
    yield made
    made.close()


def chat(text: str, name: str | None = None) -> Text:
    return text_of(KEY, name, {"messages": [{"role": "system", "content": text}]})


def record(connection: Connection, text: Text | None, audience: str = "billing") -> str:
    return record_of(connection, "acme", "intake", audience, text, NOW)


@pytest.mark.parametrize(
    "same",
    [
        NOTE,
        f" {NOTE}",
        NOTE.replace(". ", ".  "),
        NOTE.upper(),
        NOTE.replace(".", " !"),
        f"Please read this again: {NOTE}",
        NOTE.replace("Chief", "The chief"),
        "SSN: 912-55-1029. Chief complaint: back pain. The patient's name is Ada Long.",
        NOTE.replace("9", "\uff19"),
    ],
)
def test_nearly_the_same_text_is_the_same_record(connection: Connection, same: str) -> None:
    assert record(connection, chat(NOTE)) == record(connection, chat(same))


@pytest.mark.parametrize(
    "other",
    [
        NOTE.replace("1029", "1030"),
        NOTE.replace("Ada", "Eva"),
        NOTE.replace("back", "neck"),
        "Nothing of it.",
        f"{NOTE} " + " ".join(f"word{i}" for i in range(9)),
    ],
)
def test_another_value_is_another_record(connection: Connection, other: str) -> None:
    assert record(connection, chat(NOTE)) != record(connection, chat(other))


def test_records_of_one_template_stay_apart(connection: Connection) -> None:
    """A long instruction before each: what differs is a number."""
    prompt = "You are the intake agent. " + " ".join(f"Rule {i}: be brief." for i in range(200))
    found = [record(connection, chat(f"{prompt} Order {1000 + i}.")) for i in range(50)]
    assert len(set(found)) == 50


def test_a_named_record_is_that_record_whatever_its_text(connection: Connection) -> None:
    first = record(connection, chat(NOTE, "patient-17"))
    assert first == record(connection, chat("Quite another text.", "patient-17"))
    assert first != record(connection, chat(NOTE, "patient-18"))
    assert first != record(connection, chat(NOTE))
    assert record(connection, None) != record(connection, None)


def test_edges_do_not_meet(connection: Connection) -> None:
    assert record(connection, chat(NOTE)) != record(connection, chat(NOTE), "research")


def test_no_text_and_no_name_lies_in_the_database(connection: Connection, tmp_path: Path) -> None:
    record(connection, chat(NOTE))
    receive(connection, "h1", "a" * 64, record(connection, chat(NOTE, "ada-long")))
    rows = [connection.execute(f"SELECT * FROM {t}").fetchall() for t in ("texts", "segments")]
    assert all(rows)
    files = [p.read_bytes() for p in tmp_path.iterdir()]  # none where it is a server
    whole = b"".join([repr(rows).encode(), *files])
    plain = {w.encode() for w in ("patient", "Long. Chief", "ada-long", "complaint")}
    assert [w for w in plain if w in whole] == []
    assert chat(NOTE).words.isdisjoint(
        text_of(bytes(range(1, 33)), None, {"prompt": f"system {NOTE}"}).words
    )


def test_tokens_are_words_too(connection: Connection) -> None:
    one, two = (text_of(KEY, None, {"prompt": p}) for p in ([5, 6, 7, 8], [5, 6, 7, 9]))
    assert record(connection, one) != record(connection, two)
    assert record(connection, one) == record(
        connection, text_of(KEY, None, {"prompt": [5, 6, 7, 8, 5]})
    )


def receive(
    connection: Connection,
    handle: str,
    draw: str,
    record: str = "r",
    max_draws: int | None = 2,
    at_s: float = NOW,
    audience: str = "billing",
    **more: Any,
) -> None:
    if find(connection, handle) is None:
        record_segment(
            connection,
            Segment(
                handle,
                "acme",
                "intake",
                audience,
                at_s,
                at_s + 9e9,
                7,
                "gate",
                "g" * 64,
                "p" * 64,
                draw=draw,
                record=record,
                **more,
            ),
        )
    reserve_draw(connection, "acme", audience, handle, max_draws, at_s)


def test_two_draws_of_a_record_and_no_third(connection: Connection) -> None:
    receive(connection, "h1", "a")
    receive(connection, "h2", "b", at_s=NOW + 5)
    with pytest.raises(DrawsSpent, match=r"2 draws of one record .*lcguard\.publish\.record") as e:
        receive(connection, "h3", "c", at_s=NOW + 10)
    assert e.value.frees_at_s == NOW + KEEP_RECEIVED_S
    # known draws, other records, other audiences, no noise, and the audience's own text
    for handle, draw, more in (
        ("h1", "a", {}),
        ("h4", "b", {}),
        ("h5", "c", {"record": "s"}),
        ("h6", "", {}),
        ("h7", "d", {"audience": "intake"}),
        ("h8", "c", {"audience": "x"}),
    ):
        receive(connection, handle, draw, at_s=NOW + 10, **more)
    receive(connection, "h9", "c", max_draws=None)
    # the oldest receipt is forgotten, and only then
    receive(connection, "i1", "k", "t")
    receive(connection, "i2", "l", "t", at_s=NOW + 5)
    with pytest.raises(DrawsSpent):
        receive(connection, "i3", "m", "t", at_s=NOW + KEEP_RECEIVED_S - 1)
    receive(connection, "i3", "m", "t", at_s=NOW + KEEP_RECEIVED_S)


def test_what_is_old_is_swept(connection: Connection) -> None:
    receive(connection, "h1", "a")
    for i in range(KEEP_TEXTS + 3):
        record(connection, chat(f"number {i}"))
    sweep_draws(connection, NOW + 1)
    count = "SELECT (SELECT count(*) FROM draws), (SELECT count(*) FROM texts)"
    assert connection.execute(count).fetchone() == (1, KEEP_TEXTS)
    sweep_draws(connection, NOW + KEEP_RECEIVED_S)
    assert connection.execute(count).fetchone() == (0, 0)


def test_a_file_of_the_version_before_goes_on(tmp_path: Path) -> None:
    """Its rows stay; what they lack is empty."""
    path = tmp_path / "old.sqlite"
    old = sqlite3.connect(path, isolation_level=None)
    for statement in schema._TABLES:
        later = ("texts", "TABLE draws", "originals", "TABLE edges", "accounts")
        if any(new in statement for new in later):
            continue
        parts = (
            ",\n        draw TEXT NOT NULL DEFAULT ''",
            ",\n        record TEXT NOT NULL DEFAULT ''",
        )
        for part in parts:
            statement = statement.replace(part, "")
        old.execute(statement)
    old.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    old.execute("PRAGMA user_version = 1")
    old.execute(
        "INSERT INTO segments VALUES ('h1', 'acme', 'intake', 'billing', 1, 9e9, 7, 'gate', 'g', "
        "'p', '[]', NULL)"
    )
    old.close()
    with Database(path) as database:
        row = database.read(lambda c: find(c, "h1"))
        assert row is not None
        assert (row.draw, row.record) == ("", "")
        database.write_now(lambda c: receive(c, "h2", "a"))
    with Database(path) as again:
        assert again.read(lambda c: find(c, "h2")) is not None
