"""Limits that proxies of one database count together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lcguard.server.database.connection import DatabaseError
from lcguard.server.database.writer import Database
from lcguard.server.limits.key_limits import Limited, Limits
from lcguard.server.limits.shared_limits import LEASE_S, SharedLimits, sweep_accounts
from tests.server.limits.test_limits import Clock

pytest_plugins = ("tests.server.databases",)


class Pair:
    """Two proxies, each with connections of its own."""

    def __init__(self, where: Path | str, stack: ExitStack) -> None:
        self.clock = Clock()
        self.databases = [stack.enter_context(Database(where)) for _ in range(2)]
        self.proxies = [self.proxy(i, f"proxy-{i}") for i in range(2)]

    def proxy(self, i: int, name: str) -> SharedLimits:
        return SharedLimits(self.databases[i], name, self.clock)

    def settled(self) -> None:
        """Once what was posted is written."""
        for database in self.databases:
            database.write_now(lambda c: None)


@pytest.fixture
def pair(where: Path | str) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(where, stack)


def n_accounts(database: Database) -> int:
    return int(database.read(lambda c: c.execute("SELECT count(*) FROM accounts").fetchone()[0]))


def test_racing_requests_get_no_more_than_the_minute(pair: Pair) -> None:
    limits = Limits(requests_per_min=5)

    async def main() -> list[object]:
        asked = [pair.proxies[i % 2].admit("a", limits, 0) for i in range(20)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(main())
    assert found.count(None) == 5
    assert sum(isinstance(f, Limited) for f in found) == 15


def test_tokens_and_their_settlement_count_everywhere(pair: Pair) -> None:
    one, other = pair.proxies
    limits = Limits(tokens_per_min=600)

    async def main() -> None:
        await one.admit("a", limits, 500)
        with pytest.raises(Limited, match="600 tokens a minute"):
            await other.admit("a", limits, 101)
        one.end("a", limits, 500, 100)
        pair.settled()
        await other.admit("a", limits, 500)
        with pytest.raises(Limited) as refused:
            await one.admit("a", limits, 10)
        assert refused.value.retry_after_s == 1
        pair.clock.now_s += 1
        await one.admit("a", limits, 10)

    asyncio.run(main())


def test_places_are_shared_and_those_of_a_dead_proxy_come_free(pair: Pair) -> None:
    one, other = pair.proxies
    limits = Limits(concurrency=2)

    async def main() -> None:
        await one.admit("a", limits, 0)
        await other.admit("a", limits, 0)
        for proxy in pair.proxies:
            with pytest.raises(Limited, match="2 requests running"):
                await proxy.admit("a", limits, 0)
        one.end("a", limits, 0, 0)
        pair.settled()
        await other.admit("a", limits, 0)  # both places are its own now, and it is killed
        with pytest.raises(Limited):
            await one.admit("a", limits, 0)
        pair.clock.now_s += LEASE_S + 1
        await one.admit("a", limits, 0)
        await one.admit("a", limits, 0)
        with pytest.raises(Limited):
            await one.admit("a", limits, 0)

    asyncio.run(main())


def test_a_caller_that_left_keeps_no_place(pair: Pair) -> None:
    one, limits = pair.proxies[0], Limits(concurrency=1)

    async def main() -> None:
        leaving = asyncio.ensure_future(one.admit("a", limits, 0))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        while True:  # it is let in, and then let go
            try:
                return await one.admit("a", limits, 0)
            except Limited:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_where_nothing_can_be_counted_nobody_is_let_in(pair: Pair) -> None:
    one, limits = pair.proxies[0], Limits(concurrency=1)
    pair.databases[0].close()
    with pytest.raises(DatabaseError):
        asyncio.run(one.admit("a", limits, 0))


def test_what_is_as_if_never_used_is_forgotten(pair: Pair) -> None:
    (one, _), (database, _) = pair.proxies, pair.databases
    limits = Limits(requests_per_min=60)
    asyncio.run(one.admit("a", limits, 0))
    one.end("a", limits, 0, 0)
    pair.settled()
    database.write_now(lambda c: sweep_accounts(c, pair.clock.now_s))
    assert n_accounts(database) == 1
    database.write_now(lambda c: sweep_accounts(c, pair.clock.now_s + 1))
    assert n_accounts(database) == 0
