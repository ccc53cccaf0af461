"""Ready only once engine, guards and policy were seen to work together: by publishing through
every guard of the policy, consuming as the audience, and being refused as somebody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lcguard.server.errors import ProxyError


@dataclass
class Condition:
    """One thing that has to hold."""

    name: str
    ok: bool = False
    detail: str = "not checked yet"


@dataclass
class Readiness:
    """All conditions; ready where each holds."""

    conditions: dict[str, Condition] = field(default_factory=dict)
    draining: bool = False

    def set(self, name: str, ok: bool, detail: str = "") -> None:
        """Records a condition."""
        self.conditions[name] = Condition(name, ok, detail)

    @property
    def ready(self) -> bool:
        """Whether requests may be sent here."""
        return (
            not self.draining
            and bool(self.conditions)
            and all(c.ok for c in self.conditions.values())
        )

    def reasons(self) -> list[str]:
        """Of not being ready."""
        out = ["draining: the server is stopping"] if self.draining else []
        return out + [f"{c.name}: {c.detail}" for c in self.conditions.values() if not c.ok]


Check = Callable[[], Awaitable[str]]
"""Raises ``ProxyError`` or ``ValueError`` with the reason; returns a detail."""


class Watch:
    """Runs the checks again and again."""

    def __init__(self, readiness: Readiness, checks: dict[str, Check], every_s: float) -> None:
        self.readiness, self.checks, self.every_s = readiness, checks, every_s
        for name in checks:
            readiness.set(name, False, "not checked yet")
        self.last_s = 0.0

    async def run(self) -> None:
        """Until cancelled; four times as often while something is missing."""
        while True:
            await self.look()
            await asyncio.sleep(self.every_s if self.readiness.ready else self.every_s / 4)

    async def look(self) -> None:
        """One round. A later check is not tried where an earlier one failed: it builds on it."""
        failed = ""
        for name, check in self.checks.items():
            if failed:
                self.readiness.set(name, False, f"waits for {failed}")
                continue
            try:
                self.readiness.set(name, True, await check())
            except Exception as error:  # whatever it is, a watch that died would stay ready
                text = error.whole if isinstance(error, ProxyError) else str(error)
                self.readiness.set(name, False, " ".join(text.split())[:400])
                failed = name
        self.last_s = time.time()
