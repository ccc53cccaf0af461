"""What is counted from the audit: edges by event, and events by verdict."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lcguard.handoff.keys import new_key
from lcguard.server.audit.edge_counts import CANARY_TENANT, EdgeCounts
from lcguard.server.audit.trail import AuditLog, Entry
from lcguard.server.database.writer import Database


def test_a_row_is_counted_once_and_a_canarys_never(tmp_path: Path) -> None:
    database = Database(tmp_path / "audit.sqlite")
    log, counts = AuditLog(database, bytes.fromhex(new_key())), EdgeCounts()

    def write(event: str, verdict: str, tenant: str = "acme") -> None:
        hop = {"source": "intake", "audience": "billing"}
        asyncio.run(log.append(Entry(event, tenant=tenant, verdict=verdict, **hop)))  # type: ignore[arg-type]

    try:
        write("published", "allowed")
        write("refused", "blocked")
        write("published", "allowed", CANARY_TENANT)
        database.read(counts.update)
        write("published", "allowed")
        write("failed", "error")
        found = database.read(counts.update)
    finally:
        database.close()
    assert found == {("acme", "intake", "billing"): {"published": 2, "refused": 1, "failed": 1}}
    assert +counts.verdicts == {
        ("published", "allowed"): 2,
        ("refused", "blocked"): 1,
        ("failed", "error"): 1,
    }
