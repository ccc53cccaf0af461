"""A canary runner with workers in place of the real one."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lcguard.server.leakage.canaries import CanaryRunner
from lcguard.server.leakage.meter import EdgeLeakage, LeakageMeter
from tests.server.leakage.canary_edges import EDGES

# -- the schedule, with real processes


def found(audience: str, recovered: int) -> dict[str, Any]:
    share = recovered / 100
    return {
        "tenant": "t",
        "source": "a",
        "audience": audience,
        "n_secrets": 100,
        "recovered": recovered,
        "asr": share,
        "asr_low": max(0.0, share - 0.1),
        "asr_high": min(1.0, share + 0.1),
        "floor": 0.0,
        "attack": "probe",
        "seconds": 1.0,
        "guard": "gate",
        "guard_digest": "g",
        "policy_digest": "p",
    }


@dataclass
class Bench:
    """A runner with a worker in place of the real one."""

    meter: LeakageMeter
    changes: list[tuple[str, str, str]] = field(default_factory=list)
    jobs: int = 0

    def job(self) -> dict[str, Any]:
        self.jobs += 1
        edges = [{"tenant": t, "source": s, "audience": a} for t, s, a in EDGES]
        return {"token": "planted-token", "edges": edges}

    async def changed(self, edge: EdgeLeakage, old: str, new: str) -> None:
        self.changes.append((edge.audience, old, new))

    def runner(
        self, code: str, timeout_s: float = 60, job: Callable[[], Any] | None = None, **more: Any
    ) -> CanaryRunner:
        return CanaryRunner(
            [sys.executable, "-c", code],
            job or self.job,
            self.meter,
            more.pop("interval_s", 3600),
            timeout_s,
            more.pop("on_change", self.changed),
            **more,
        )

    def errors(self) -> list[str]:
        return [e.error for e in self.meter.snapshot()]


def says(*results: Any, more: str = "", code: int = 0) -> str:
    """A worker that reads its job, and prints these as a library chatters."""
    line = json.dumps({"results": results})
    return (
        f"import json, sys; job = json.load(sys.stdin); print('chatter'); {more}\n"
        f"print({line!r}); sys.exit({code})"
    )


async def until(true: Callable[[], Any], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.01)


def pass_now(deadline: asyncio.Timeout) -> None:
    deadline.reschedule(asyncio.get_running_loop().time())


async def stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def alive(pid: int) -> bool:
    """A process that is neither gone nor waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
