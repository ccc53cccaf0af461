"""What scenarios hold, and what of their source they cannot hold."""

from __future__ import annotations

from collections.abc import Iterable

from lcguard.agents.scenarios.types import Record, Scenario, hops_of
from lcguard.tokens import REPEAT


def tally(scenarios: Iterable[Scenario]) -> dict[str, int]:
    all_of = list(scenarios)
    hops = hops_of(all_of)
    return {
        "scenarios": len(all_of),
        "usable": len({h.scenario_id for h in hops}),
        "records": len(hops),
        "secrets": sum(h.is_secret(s) for h in hops for s in h.record.spans),
        "task_questions": sum(h.is_task(q) for h in hops for q in h.record.questions),
        "not_asked": sum(_unasked(h.record) for h in hops),
        "not_applicable": sum(len(s.not_applicable) for s in all_of),
    }


def _unasked(record: Record) -> int:
    return sum(s.category is None and s.field != REPEAT for s in record.spans) - sum(
        q.category is None for q in record.questions
    )
