"""The ledger: budgets hold under concurrency, a revocation reaches all that was built on it."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcguard.server.audit.trail import AuditLog, Entry, recent
from lcguard.server.audit.verify import verify
from lcguard.server.database import schema
from lcguard.server.database.connection import Connection
from lcguard.server.database.sqlite_file import SQLITE
from lcguard.server.database.writer import Database
from lcguard.server.leakage.ledger import (
    KEEP_RECEIVED_S,
    KEEP_SEGMENTS_S,
    BudgetSpent,
    LedgerError,
    Segment,
    SegmentRevoked,
    find,
    live,
    received_counts,
    record_segment,
    reserve,
    revoke,
    sweep,
)

KEY, NOW, DAY = b"k" * 32, 1_700_000_000.0, 86_400.0


pytest_plugins = ("tests.server.databases",)


@pytest.fixture
def database(where: Path | str) -> Iterator[Database]:
    with Database(where) as opened:
        yield opened


def segment(handle: str, *parents: str, **more: Any) -> Segment:
    values: dict[str, Any] = {
        "tenant": "acme",
        "source": "intake",
        "audience": "billing",
        "created_at_s": NOW,
        "expires_at_s": NOW + 3600,
        "n_tokens": 7,
        "guard": "gate",
        "guard_digest": "g" * 64,
        "policy_digest": "p" * 64,
    }
    return Segment(handle, **{**values, **more}, parents=parents)


def book(
    database: Database,
    *handles: str,
    source: str = "intake",
    audience: str = "billing",
    tenant: str = "acme",
    budget: int | None = 3,
    window_s: float = DAY,
    at_s: float = NOW,
) -> None:
    pairs = [(handle, source) for handle in handles]
    database.write_now(lambda c: reserve(c, tenant, audience, pairs, budget, window_s, at_s))


def put(database: Database, *segments: Segment) -> None:
    for one in segments:
        database.write_now(partial(record_segment, segment=one))


def counts(database: Database, at_s: float = NOW, **more: Any) -> dict[tuple[str, str], int]:
    return database.read(
        lambda c: received_counts(c, more.get("tenant", "acme"), more.get("window_s", DAY), at_s)
    )


def handles(segments: list[Segment]) -> list[str]:
    return [s.handle for s in segments]


def test_segments_are_found_as_recorded(database: Database) -> None:
    first, second = segment("a", expires_at_s=NOW + 5.25), segment("b", "a", "x", n_tokens=9)
    put(database, first, second)
    assert database.read(lambda c: find(c, "a")) == first
    assert database.read(lambda c: find(c, "b")) == second
    assert database.read(lambda c: find(c, "c")) is None
    with pytest.raises(LedgerError, match="is taken"):
        put(database, segment("a", n_tokens=8))
    assert database.read(lambda c: find(c, "a")) == first


def test_live(database: Database) -> None:
    put(
        database,
        segment("old"),
        segment("new", created_at_s=NOW + 1),
        segment("short", expires_at_s=NOW + 10),
        segment("gone"),
        segment("other", tenant="evil"),
    )
    database.write_now(lambda c: revoke(c, "gone", NOW, False))
    at = partial(lambda s, c: handles(live(c, "acme", s)))
    assert database.read(partial(at, NOW + 9.9)) == ["new", "old", "short"]
    assert database.read(partial(at, NOW + 10)) == ["new", "old"]
    assert database.read(partial(at, NOW + 3600)) == []


def test_budget_counts_distinct_segments_of_one_source(database: Database) -> None:
    book(database, "a", "b", "c", "c")
    book(database, "c", "a")  # again: costs nothing
    book(database, "a", "b", "c", budget=0)  # even where nothing new may come
    with pytest.raises(BudgetSpent) as caught:
        book(database, "d")
    error = caught.value
    assert (error.audience, error.source, error.budget) == ("billing", "intake", 3)
    assert error.frees_at_s == NOW + DAY
    assert str(error) == (
        "audience 'billing' may receive 3 segments of source 'intake' in 86400 s: there is room "
        "again at 2023-11-15T22:13:20+00:00"
    )
    book(database, "d", source="lab")
    book(database, "d", audience="auditor")
    book(database, "d", tenant="other")
    book(database, "e", "f", budget=None)
    assert counts(database) == {
        ("intake", "billing"): 5,
        ("lab", "billing"): 1,
        ("intake", "auditor"): 1,
    }
    assert counts(database, tenant="other") == {("intake", "billing"): 1}


def test_window(database: Database) -> None:
    for i in range(3):
        book(database, f"h{i}", at_s=NOW + 10 * i)
    with pytest.raises(BudgetSpent) as caught:
        book(database, "x", at_s=NOW + DAY - 0.001)
    assert caught.value.frees_at_s == NOW + DAY
    with pytest.raises(BudgetSpent) as caught:
        book(database, "x", "y", at_s=NOW + 30)  # two places: the second oldest counts
    assert caught.value.frees_at_s == NOW + 10 + DAY
    with pytest.raises(BudgetSpent, match="ask for fewer at a time") as caught:
        book(database, "w", "x", "y", "z", at_s=NOW + 30)
    assert caught.value.frees_at_s is None
    book(database, "x", at_s=NOW + DAY)
    assert counts(database, NOW + DAY) == {("intake", "billing"): 3}
    # A clock that was put back frees nothing.
    with pytest.raises(BudgetSpent):
        book(database, "y", at_s=NOW - 10 * DAY)


@settings(max_examples=60)
@given(
    st.floats(0, 2e9),
    st.floats(1e-3, KEEP_RECEIVED_S),
    st.integers(1, 3),
)
def test_the_named_time_is_when_it_fits(now_s: float, window_s: float, budget: int) -> None:
    """To the last bit: a client that waits until then is not sent away once more."""
    connection = memory()
    first = [(f"a{i}", "intake") for i in range(budget)]
    reserve(connection, "acme", "billing", first, budget, window_s, now_s)
    again = partial(reserve, connection, "acme", "billing", [("b", "intake")], budget, window_s)
    with pytest.raises(BudgetSpent) as caught:
        again(now_s)
    assert caught.value.frees_at_s is not None
    again(caught.value.frees_at_s)
    connection.close()


def memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    schema.prepare(connection, SQLITE)
    return connection


def test_several_at_once_are_all_or_nothing(database: Database) -> None:
    pairs = [("a", "intake"), *((f"l{i}", "lab") for i in range(4)), ("b", "intake")]
    with pytest.raises(BudgetSpent, match="source 'lab'"):
        database.write_now(lambda c: reserve(c, "acme", "billing", pairs, 3, DAY, NOW))
    assert counts(database) == {}


@pytest.mark.parametrize(
    ("budget", "window_s"), [(-1, DAY), (3, 0), (3, KEEP_RECEIVED_S + 1), (3, float("nan"))]
)
def test_senseless_budgets(database: Database, budget: int, window_s: float) -> None:
    with pytest.raises(ValueError, match="give a budget from 0"):
        book(database, "a", budget=budget, window_s=window_s)


def test_budget_holds_under_concurrency(database: Database) -> None:
    """32 requests for 5 places, over two connections: 5 rows, 5 receipts, 27 refusals."""
    second = Database(database.where, busy_timeout_s=60)
    logs = [AuditLog(database, KEY), AuditLog(second, KEY)]

    async def consume(i: int) -> object:
        also = partial(
            reserve,
            tenant="acme",
            audience="billing",
            handles=[(f"h{i}", "intake")],
            budget=5,
            window_s=DAY,
            now_s=NOW,
        )
        return await logs[i % 2].append(Entry("consume", handle=f"h{i}"), also)

    async def main() -> list[object]:
        return await asyncio.gather(*map(consume, range(32)), return_exceptions=True)

    found = asyncio.run(main())
    second.close()
    kept = [i for i, f in enumerate(found) if isinstance(f, int)]
    assert len(kept) == 5
    assert sum(isinstance(f, BudgetSpent) for f in found) == 27
    assert counts(database) == {("intake", "billing"): 5}
    rows = database.read(recent)
    assert {row["handle"] for row in rows} == {f"h{i}" for i in kept}
    assert verify(database.where, KEY).problems == []


def test_revoke(database: Database) -> None:
    put(database, segment("a"), segment("b", "a"))
    assert database.write_now(lambda c: revoke(c, "a", NOW, False)) == ["a"]
    assert database.write_now(lambda c: revoke(c, "a", NOW + 1, False)) == []
    assert database.write_now(lambda c: revoke(c, "none", NOW, True)) == []
    found = database.read(lambda c: find(c, "a"))
    assert found is not None
    assert found.revoked_at_s == NOW  # of the first time
    assert database.read(lambda c: handles(live(c, "acme", NOW))) == ["b"]
    # what the first call left out can still be reached
    assert database.write_now(lambda c: revoke(c, "a", NOW, True)) == ["b"]


def test_cascade_reaches_everything_on_top(database: Database) -> None:
    put(
        database,
        segment("a"),
        segment("b"),
        segment("c", "a", "b"),
        segment("d", "c"),
        segment("e", "b"),
        segment("f", "d", "e"),
        segment("g"),
    )
    assert database.write_now(lambda c: revoke(c, "a", NOW, True)) == ["a", "c", "d", "f"]
    assert database.read(lambda c: handles(live(c, "acme", NOW))) == ["b", "e", "g"]


def test_cascade_passes_a_link_that_was_swept(database: Database) -> None:
    late = NOW + 10 * DAY
    put(
        database,
        segment("a", expires_at_s=late),
        segment("b", "a"),
        segment("c", "b", expires_at_s=late),
    )
    assert database.write_now(lambda c: sweep(c, NOW + 3 * DAY)) == 1
    assert database.read(lambda c: find(c, "b")) is None
    assert database.write_now(lambda c: revoke(c, "a", NOW + 3 * DAY, True)) == ["a", "c"]


def test_revoked_while_on_the_way(database: Database) -> None:
    put(database, segment("a"), segment("b"))
    database.write_now(lambda c: revoke(c, "a", NOW, False))
    with pytest.raises(SegmentRevoked, match=r"segment a\.\.\. was revoked"):
        put(database, segment("on-top", "b", "a"))
    with pytest.raises(SegmentRevoked):
        book(database, "b", "a")
    assert counts(database) == {}
    assert database.read(lambda c: find(c, "on-top")) is None
    book(database, "b", "not-listed")


def test_sweep(database: Database) -> None:
    put(database, segment("a"), segment("b", "a", expires_at_s=NOW + 2 * DAY))
    book(database, "a")
    edge = NOW + 3600 + KEEP_SEGMENTS_S
    assert database.write_now(lambda c: sweep(c, edge)) == 0
    assert database.write_now(lambda c: sweep(c, edge + 1)) == 1
    assert database.write_now(lambda c: sweep(c, edge + 1)) == 0
    assert database.read(lambda c: find(c, "b")) is not None
    # The receipt outlives the segment, as long as any window may be.
    last = NOW + KEEP_RECEIVED_S
    database.write_now(lambda c: sweep(c, last))
    assert counts(database, last - 1, window_s=KEEP_RECEIVED_S) == {("intake", "billing"): 1}
    database.write_now(lambda c: sweep(c, last + 1))
    for table in ("segments", "ancestors", "received"):
        query: Callable[[Connection], int] = partial(n_rows, table=table)
        assert database.read(query) == 0, table


def n_rows(connection: Connection, table: str) -> int:
    (n,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(n)


def test_counts_follow_a_simple_model(database: Database) -> None:
    """Against sets in memory: random requests, the same verdicts and the same counts."""
    rng, model = random.Random(1), dict[str, float]()
    for i in range(150):
        at_s, wanted = NOW + 100 * i, {f"h{rng.randrange(40)}" for _ in range(rng.randint(1, 3))}
        inside = {h for h, t in model.items() if t + 1000 > at_s}
        new = wanted - model.keys()
        fits = not new or len(inside | new) <= 6
        try:
            book(database, *wanted, budget=6, window_s=1000, at_s=at_s)
        except BudgetSpent:
            assert not fits
        else:
            assert fits
            model |= dict.fromkeys(new, at_s)
        n = sum(t + 1000 > at_s for t in model.values())
        assert counts(database, at_s, window_s=1000).get(("intake", "billing"), 0) == n
