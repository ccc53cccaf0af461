"""Hops of any source as lines that ``lcguard.agents.scenarios.jsonl`` reads."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from lcguard.agents.scenarios.types import Hop


def jsonl_of(hops: Sequence[Hop], unlabelled: Collection[str] = ()) -> str:
    """A line a hop, named by scenario and record.

    What the format cannot say is left out: bands, questions about what is not there, and spans of
    no category. ``unlabelled``: categories whose values are left without a span, as if nobody had
    known of them; their questions are the receiver's task then.
    """
    return "".join(json.dumps(_line(h, unlabelled), ensure_ascii=False) + "\n" for h in hops)


def _line(hop: Hop, unlabelled: Collection[str]) -> dict[str, Any]:
    record = hop.record
    spans = [
        {"start": s.start, "end": s.end, "category": s.category, "field": s.field, "value": s.value}
        for s in sorted(record.spans, key=lambda s: s.start)
        if s.category is not None and s.category not in unlabelled
    ]
    questions = []
    for q in record.questions:
        if q.kind == "direct":
            asked: dict[str, str] = {"question": q.text, "answer": q.answer, "field": q.field}
            if q.category is not None and q.category not in unlabelled:
                asked["category"] = q.category
            questions.append(asked)
    name = f"{hop.scenario_id}/{record.record_id}"
    return {"id": name, "text": record.text, "spans": spans, "questions": questions}
