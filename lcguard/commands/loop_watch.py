"""After a promotion: the version before comes back as soon as canaries show that the new one leaks.

The proxy closes the edge by itself, at once and before anybody watches. What is done here is to put
another guard behind it, so that it can open again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lcguard.commands.loop_leakage import screened_edges
from lcguard.guards.registry import Registry, RegistryError
from lcguard.server.leakage.edge_state import EdgeLeakage


class Watched(NamedTuple):
    """What a look at the canaries came to."""

    action: str
    """``none``, ``rollback``, or ``stuck``: it leaks and there is no version to go back to."""
    version: str
    """Live afterwards."""
    why: str


def leaking(database: str | Path, digest: str, limit: float) -> list[EdgeLeakage]:
    """Edges whose last screening under the guard of ``digest`` shows that it leaks: the interval's
    lower end is above ``limit`` and above what is guessed blind."""
    return [
        e
        for e in screened_edges(database).values()
        if e.guard_digest == digest
        and e.asr_low is not None
        and e.asr_low > max(limit, e.floor or 0.0)
    ]


def watch_once(registry: Registry, database: str | Path, limit: float) -> Watched:
    """Rolls back where the live guard leaks. Raises ``RegistryError`` and ``ValueError`` for
    what cannot be read: nothing is changed then."""
    live = registry.state.live_version
    found = leaking(database, live.digest, limit)
    if not found:
        return Watched("none", live.name, "")
    why = "; ".join(
        f"{'/'.join(e.name)}: {e.recovered} of {e.n_secrets} planted secrets read, at least "
        f"{e.asr_low:.0%}"
        for e in found
    )
    try:
        return Watched("rollback", registry.rollback(why).name, why)
    except RegistryError as error:
        registry.withdraw(live.name, why)
        return Watched("stuck", live.name, f"{why}; {error}")


def watch(
    registry: Registry,
    database: str | Path,
    limit: float,
    every_s: float,
    tell: Callable[[Watched], None],
) -> None:
    """Looks every so often, until Ctrl-C; ``tell`` hears of each change once."""
    before: Watched | None = None
    while True:
        now = watch_once(registry, database, limit)
        if now.action != "none" and now != before:
            tell(now)
        before = now
        time.sleep(every_s)
