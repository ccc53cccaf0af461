"""Policies of text edges for tests, and how a planted value is looked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lcguard.handoff.policy import Policy, parse_policy
from lcguard.text.guard import TextGuard
from lcguard.value_search import Spellings

KEY = b"a test's deployment key, 32 bytes"
TERMS = (
    *("Zoë Unit 4711", "Zoë Unit 4712", "Blue Heron", "Grey Fox", "Kite"),
    *("Red Harbour", "Long March", "North Quay", "Élan", "Silver Birch"),
)
PATTERN = r"PRJ-\d{4}"


def policy(**edge: Any) -> Policy:
    """Text from intake to billing; own categories alone are forbidden."""
    own = {"project": {"terms": [*TERMS], "patterns": [PATTERN]}}
    given = {"source": "intake", "audience": "billing", "channel": "text", "forbid": ["project"]}
    return parse_policy({"version": 1, "categories": own, "edges": [given | edge]})


def guard(conversation: str = "", **edge: Any) -> TextGuard:
    """Of that edge."""
    return TextGuard(policy(**edge), "intake", "billing", key=KEY, conversation=conversation)


def read(value: Any) -> Iterator[str]:
    """Every text that a value holds, JSON inside strings read, keys and numbers too, and the parts
    of a content as one."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from read(name)
            yield from read(item)
    elif isinstance(value, list | tuple):
        yield "".join(str(p.get("text", "")) for p in value if isinstance(p, dict) and "type" in p)
        for item in value:
            yield from read(item)
    elif isinstance(value, str):
        yield value
        if value.lstrip()[:1] in ("{", "["):
            try:
                yield from read(json.loads(value))
            except ValueError:
                pass
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
        yield str(int(value))


def leaks(value: Any, planted: str) -> list[str]:
    """The texts of a value in which something that was planted can still be read, in any
    spelling."""
    return [t for t in read(value) if Spellings(t).find(planted)]
