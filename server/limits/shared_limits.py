"""The limits that a key's own entry states, counted by all proxies of one database together.

An account is a row: what its buckets hold, and how many requests run at each proxy. Requests at a
proxy that was killed count until their lease is over. What an entry does not state, such as the
default of ``limits.key_concurrency``, holds for each proxy by itself (``KeyLimits``).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.database.writer import Database
from lcguard.server.limits.key_limits import Account, Admission, Limits

LEASE_S = 30.0


class SharedLimits:
    """Of one proxy; for one event loop."""

    def __init__(
        self, database: Database, proxy: str, clock: Callable[[], float] = time.time
    ) -> None:
        """``proxy``: a name that no other proxy has."""
        self._database, self._proxy, self._clock = database, proxy, clock
        self._running: Counter[str] = Counter()
        """Requests of each key at this proxy."""
        self._lock = threading.Lock()

    async def admit(self, key_id: str, limits: Limits, tokens: int) -> None:
        """Lets one request in, until ``end``, and sets ``tokens`` aside; all of it or nothing.

        Raises ``Limited``, and ``DatabaseError`` where nobody can tell.
        """

        counted = False

        def work(connection: Connection) -> None:
            nonlocal counted
            account, leases = self._load(connection, key_id)
            account.apply(limits, self._clock())
            account.running = sum(n for n, _ in leases.values()) + self._running[key_id]
            account.admit(limits, self._clock(), tokens)
            self._count(key_id, 1)
            counted = True
            self._save(connection, key_id, account, leases)

        writing = asyncio.ensure_future(self._database.write(work))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:  # it may be let in all the same
            writing.add_done_callback(
                lambda done: None if done.exception() else self.end(key_id, limits, tokens, 0)
            )
            raise
        except DatabaseError:
            if counted:
                self._count(key_id, -1)
            raise

    def end(self, key_id: str, limits: Limits, reserved: int, used: int) -> None:
        """The request is over; ``used`` tokens are charged in place of those ``reserved``. Written
        behind what waits; where it cannot be, what was set aside is charged."""
        self._count(key_id, -1)

        def work(connection: Connection) -> None:
            account, leases = self._load(connection, key_id)
            account.apply(limits, self._clock())
            Admission(account, self._clock, reserved).settle(used)
            self._save(connection, key_id, account, leases)

        self._database.post(work)

    async def keep_leases(self) -> None:
        """Until cancelled: what still runs here goes on to count elsewhere."""

        def work(connection: Connection) -> None:
            for key_id in [k for k, n in list(self._running.items()) if n]:
                self._save(connection, key_id, *self._load(connection, key_id))

        while True:
            await asyncio.sleep(LEASE_S / 3)
            with suppress(DatabaseError):
                await self._database.write(work)

    def _count(self, key_id: str, n: int) -> None:
        with self._lock:
            self._running[key_id] += n
            if not self._running[key_id]:
                del self._running[key_id]

    def _load(
        self, connection: Connection, key_id: str
    ) -> tuple[Account, dict[str, tuple[int, float]]]:
        """The account, and what runs at other proxies that still live."""
        row = connection.execute(
            "SELECT spent FROM accounts WHERE key_id = ?", (key_id,)
        ).fetchone()
        spent = {} if row is None else json.loads(row[0])
        leases = {
            proxy: (n, until_s)
            for proxy, (n, until_s) in spent.pop("running", {}).items()
            if proxy != self._proxy and until_s > self._clock()
        }
        return Account.restored(spent), leases

    def _save(
        self,
        connection: Connection,
        key_id: str,
        account: Account,
        leases: dict[str, tuple[int, float]],
    ) -> None:
        now_s = self._clock()
        if n := self._running[key_id]:
            leases = leases | {self._proxy: (n, now_s + LEASE_S)}
        idle_from_s = max([account.full_at_s(now_s), *(until_s for _, until_s in leases.values())])
        connection.execute(
            "INSERT INTO accounts (key_id, spent, idle_from_s) VALUES (?, ?, ?) ON CONFLICT "
            "(key_id) DO UPDATE SET spent = EXCLUDED.spent, idle_from_s = EXCLUDED.idle_from_s",
            (key_id, json.dumps(account.saved() | {"running": leases}), idle_from_s),
        )


def sweep_accounts(connection: Connection, now_s: float) -> None:
    """Forgets the accounts that are as if they had never been used."""
    connection.execute("DELETE FROM accounts WHERE idle_from_s <= ?", (now_s,))
