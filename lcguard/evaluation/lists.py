"""What an attacker who chooses from a list of candidates recovers, by the size of the list.

His task is another than writing a value: blind, he is right once in a list. That chance, exact and
not sampled, is the floor; ``blind`` is what the same attack really did on segments of other
records, and shows whether his lists gave the true values away by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lcguard.evaluation.outcomes import Attempt, Outcome
from lcguard.evaluation.statistics import asr_by_category, mean_over_categories
from lcguard.protocols import Guess


def as_extra(guess: Guess) -> dict[str, Any]:
    """What a journal line keeps of a guess from lists; nothing of any other."""
    if not guess.lists:
        return {}
    ranked = {str(n): r._asdict() for n, r in guess.lists.items()}
    return {"lists": ranked, "length_nats": guess.length_nats}


def list_figures(attempts: Sequence[Attempt], blind: Sequence[Attempt]) -> dict[str, Any]:
    """By size of list as text, and ``length_nats``; empty where nobody chose from lists."""
    sizes = sorted({int(n) for a in attempts for n in a.extra.get("lists", {})})
    out: dict[str, Any] = {str(n): _figures(attempts, blind, str(n)) for n in sizes}
    lengths = [a.extra["length_nats"] for a in attempts if "length_nats" in a.extra]
    if lengths:
        out["length_nats"] = float(np.mean(lengths))
    return out


def _figures(attempts: Sequence[Attempt], blind: Sequence[Attempt], size: str) -> dict[str, Any]:
    used, others = _of(attempts, size), _of(blind, size)
    ranked = [a.extra["lists"][size] for a in used]
    found = mean_over_categories(used)
    chances: dict[str, list[float]] = {}
    for attempt, r in zip(used, ranked, strict=True):
        chances.setdefault(attempt.category, []).append(1 / r["size"])
    chance = {name: float(np.mean(x)) for name, x in chances.items()}
    return {
        "asr": found.value,
        "ci": found.ci,
        "floor": float(np.mean(list(chance.values()))),
        "blind": mean_over_categories(others).value if others else None,
        "rank_median": float(np.median([r["rank"] for r in ranked])),
        "nats": float(np.mean([r["nats"] for r in ranked])),
        "n": len(used),
        "shorter": float(np.mean([r["size"] < int(size) for r in ranked])),
        "by_category": {
            name: {**entry, "floor": chance[name]} for name, entry in asr_by_category(used).items()
        },
    }


def _of(attempts: Sequence[Attempt], size: str) -> list[Attempt]:
    """The attempts that had such a list, as won where the true value came first in it."""
    return [
        replace(
            a,
            outcome=Outcome.SUCCESS if a.extra["lists"][size]["rank"] == 1 else Outcome.RESISTED,
            key="",
        )
        for a in attempts
        if size in a.extra.get("lists", {})
    ]
