"""Attackers that know the tiny model, and what they read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from lcguard.attacks.base import attack_class
from lcguard.categories import CATEGORIES
from lcguard.protocols import AttackData
from lcguard.records import TokenRecord, TokenSpan
from lcguard.rule import Rule
from lcguard.training.dataset import attack_data
from tests.fixtures import World
from tests.matrix import ATTACKS

# These have the agents' model read, and cannot before that can: see test_asking.py.
ASKING = ("tuned_receiver", "soft_prefix")


FITTED = [n for n in ATTACKS if attack_class(n).fitted and n not in ASKING]


STEPPED = [n for n in FITTED if "fit" in ATTACKS[n]]
"""Fitted step by step, by a ``FitConfig``; the others in closed form or by search."""


def few(name: str, steps: int = 3) -> dict[str, Any]:
    if name not in STEPPED:
        return ATTACKS[name]
    return {**ATTACKS[name], "fit": {**ATTACKS[name]["fit"], "steps": steps}}


def data_of(world: World, records: Sequence[Any]) -> AttackData:
    return attack_data(records, world.source.prefill([r.ids for r in records]), world.special)


def form(n: int, seed: int) -> list[TokenRecord]:
    """Two labelled three-digit values between words: little enough to invert in seconds."""
    rng, out = random.Random(seed), []
    for i in range(n):
        ids: list[int] = []
        spans = []
        for label, name in ((600, "pin"), (601, "code")):
            ids += [rng.randrange(100, 110), label]
            spans.append(TokenSpan(len(ids), len(ids) + 3, name, "account", None, True))
            ids += [rng.randrange(10, 18) for _ in range(3)]
        name = f"{seed}-{i}"
        rule = Rule(CATEGORIES)
        out.append(TokenRecord(name, name, "a->b", "form", "v", tuple(ids), tuple(spans), (), rule))
    return out
