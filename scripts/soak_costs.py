"""What each kind of a soak's requests costs in processor time, by process, asked one at a time.

``soak`` writes it beside what it saw, and ``simulate_growth`` says from it what the mixture must
have done on that machine, whose cores clients, proxy, server and engine share.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

ROLES = ("client", "proxy", "server", "engine")
IDLE_S = 3.0
BUSY_S = 15.0
TICKS = os.sysconf("SC_CLK_TCK") / 1e3
"""A millisecond, in ticks of a processor's account."""


class Asking(Protocol):
    """A soak's clients: ``_KIND()`` sends one request of a kind."""

    weights: Mapping[str, int]


def processes(proxy: int) -> dict[str, list[int]]:
    """By role: this one, a proxy, and what it started: vLLM's server and its engine."""
    below, found = {proxy}, {"client": [os.getpid()], "proxy": [proxy], "server": [], "engine": []}
    parents = {pid: int(stat[1]) for pid, stat in _stats().items()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    for pid in sorted(below - {proxy}):
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
        found["engine" if b"EngineCore" in name else "server"].append(pid)
    return found


def _stats() -> dict[int, list[str]]:
    """Of every process, what stands behind its name in ``/proc/PID/stat``."""
    out = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            out[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return out


def spent_ms(of: Mapping[str, list[int]]) -> dict[str, float]:
    """Processor time by role, since the processes began."""
    stats = _stats()
    return {
        role: sum(int(t) for pid in pids if pid in stats for t in stats[pid][11:13]) / TICKS
        for role, pids in of.items()
    }


async def measured_costs(load: Asking, of: Mapping[str, list[int]], n: int, clients: int) -> Any:
    """Milliseconds of processor a request, by kind and role, without what is spent at rest; and
    chats a second where ``clients`` ask for nothing else."""
    before = spent_ms(of)
    await asyncio.sleep(IDLE_S)
    after = spent_ms(of)
    rest = {role: (after[role] - before[role]) / IDLE_S for role in ROLES}  # in a second
    kinds = {}
    for kind in load.weights:
        before, started = spent_ms(of), time.monotonic()
        for _ in range(n):
            await getattr(load, f"_{kind}")()
        after, seconds = spent_ms(of), time.monotonic() - started
        kinds[kind] = {
            role: round(max(0.0, after[role] - before[role] - rest[role] * seconds) / n, 3)
            for role in ROLES
        }
    until, answered = time.monotonic() + BUSY_S, 0

    async def client() -> None:
        nonlocal answered
        while time.monotonic() < until:
            await load._chat()  # type: ignore[attr-defined]
            answered += 1

    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    rate = answered / (time.monotonic() - started)
    return {
        "requests": n,
        "cores": os.cpu_count(),
        "at_rest_ms_per_s": {k: round(v, 3) for k, v in rest.items()},
        "kinds_ms": kinds,
        "chats_per_s": round(rate, 3),
    }
