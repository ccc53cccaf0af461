"""Watches the files that are followed, and writes each change to the audit."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from lcguard.canonical import canonical_digest
from lcguard.server.audit.trail import Entry, Event
from lcguard.server.database.connection import DatabaseError
from lcguard.server.state import Proxy

logger = logging.getLogger("lcguard.server")
EVERY_S = 0.5


async def note_changes(proxy: Proxy) -> None:
    """Until cancelled. Looking is also what makes an idle server read a new file."""
    policy, keys = _policy(proxy), _keys(proxy)
    while True:
        await asyncio.sleep(EVERY_S)
        policy = await _note(proxy, "policy", policy, _policy(proxy))
        keys = await _note(proxy, "keys", keys, _keys(proxy))


def _policy(proxy: Proxy) -> tuple[str, str, str]:
    found = proxy.authority.policy
    # the digest says nothing of terms: what changes with them is seen here, and written nowhere
    return proxy.policy_error(), found.digest, canonical_digest(found.definitions)


def _keys(proxy: Proxy) -> tuple[str, str, str]:
    n = proxy.keyring.n_keys
    return proxy.keyring.error, f"{n} keys, reading {proxy.keyring.loads}", ""


async def _note(
    proxy: Proxy, event: Event, before: tuple[str, str, str], now: tuple[str, str, str]
) -> tuple[str, str, str]:
    if now == before:
        return before
    error, state, _ = now
    if error:
        proxy.metrics.files.labels(event).inc()
        logger.warning("%s: %s; what was in force stays", event, error)
    entry = Entry(
        event,
        verdict="error" if error else "allowed",
        reason=error or state,
        policy_digest=state if event == "policy" else "",
    )
    with suppress(DatabaseError):
        await proxy.audit.append(entry)
    return now
