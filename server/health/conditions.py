"""The conditions of readiness, each a check that returns a detail or raises what does not hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lcguard.handoff.policy import Policy
from lcguard.reloading import ReloadingFile
from lcguard.server.audit.trail import AuditLog
from lcguard.server.engine import Engine
from lcguard.server.errors import ProxyError
from lcguard.server.health.clocks import Clocks
from lcguard.server.health.guard_files import GuardFiles
from lcguard.server.health.readiness import Check
from lcguard.server.health.selftest import SelfTest
from lcguard.store import SegmentStore
from lcguard.store.line import StoreLine

TAKE_OVER_S = (0.0, 0.25, 0.5, 1.0)
"""Waits before an engine is tried again that has not gone over to a promoted guard yet."""


@dataclass
class Conditions:
    """What has to hold before anyone is served. Raise ``ProxyError`` with what does not."""

    selftest: SelfTest
    clocks: Clocks
    guard_files: GuardFiles
    policy: ReloadingFile[Policy]
    audit: AuditLog
    store: SegmentStore
    line: StoreLine
    engine: Engine | None
    """The vLLM that was started; None: one that others started."""
    _blocked: dict[str, str] = field(default_factory=dict)
    _engine_starts: int = 0

    def publishing_blocked(self) -> str:
        """Why nothing may be published now; empty while it may."""
        return next(iter(self._blocked.values()), "")

    def checks(self) -> dict[str, Check]:
        """In the order in which they build on each other."""
        return {
            "engine": self.engine_answers,
            "door": self.door_is_shut,
            "store": self.store_works,
            "clocks": self.clocks.check,
            "guards": self.guards_guard,
            "guard_files": self.guards_are_intact,
            "policy": self.policy_is_good,
            "audit": self.audit_works,
        }

    async def engine_answers(self) -> str:
        """vLLM serves the model; after another start all is to be tested again."""
        if self.engine is None:
            return await self.selftest.engine()
        if self.engine.starts != self._engine_starts:
            self._engine_starts = self.engine.starts
            self.selftest.forget()
        if self.engine.failure:
            raise ProxyError(503, self.engine.failure, code="engine")
        try:
            detail = await self.selftest.engine()
        except ProxyError:
            self.engine.check_start()
            raise
        self.engine.answered = True
        return detail

    async def door_is_shut(self) -> str:
        async with self._blocks("door", lambda error: error.code == "door"):
            return await self.selftest.door()

    async def guards_guard(self) -> str:
        """Each hands over through the engine; again where another version was promoted, which the
        engine takes over a moment after it is first asked for it."""
        tries = 0
        while tries < len(TAKE_OVER_S) and await asyncio.to_thread(
            self.guard_files.promoted, self.selftest.digests
        ):
            await asyncio.sleep(TAKE_OVER_S[tries])
            tries += 1
            self.selftest.forget()
            await self.selftest.guards()
        if tries:
            await asyncio.to_thread(self.guard_files.read_cards)
        return await self.selftest.guards()

    async def guards_are_intact(self) -> str:
        async with self._blocks("guards", lambda error: True):
            return await asyncio.to_thread(self.guard_files.check, self.selftest.digests)

    async def policy_is_good(self) -> str:
        if self.policy.error:
            raise ProxyError(503, f"{self.policy.error}; the one before is in force", code="policy")
        return f"digest {self.policy.current().digest[:12]}"

    async def audit_works(self) -> str:
        await self.audit.database.write(lambda connection: None)
        return f"{(await asyncio.to_thread(self.audit.head)).count} rows"

    async def store_works(self) -> str:
        await self.line.run(self.store.check)
        return "a write, a read and a delete were done"

    @asynccontextmanager
    async def _blocks(
        self, name: str, decides: Callable[[ProxyError], bool]
    ) -> AsyncIterator[None]:
        """What fails here keeps everybody from publishing until it holds again."""
        try:
            yield
        except ProxyError as error:
            if decides(error):
                self._blocked[name] = error.message
            raise
        self._blocked.pop(name, None)
