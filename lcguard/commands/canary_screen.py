"""What a cheap attack recovers of planted records: the figures that close and open edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lcguard.attacks.base import attack_class
from lcguard.commands.canary_records import Words
from lcguard.evaluation.intervals import wilson
from lcguard.protocols import AttackData
from lcguard.training.dataset import blind

ATTACKS: dict[str, dict[str, Any]] = {
    # as strong as with 2048 tokens a step, in a quarter of the time
    "probe": {"fit": {"steps": 300, "batch": 512, "lr": 5e-3}},
    "linear": {},
}
"""Attacks that need no model of the agents and a few seconds of one core. A decoder takes minutes
beside a live server: that is for ``lcguard eval``."""


class Screened(NamedTuple):
    """What an attack recovered."""

    n_secrets: int
    recovered: int
    asr: float
    asr_low: float
    asr_high: float
    floor: float


class Reading(NamedTuple):
    """What a screening found."""

    figures: Screened
    """Of all values, or of the one category that leaks by itself."""
    by_category: dict[str, Screened]
    category: str
    """The one; empty where there is none."""


Attempt = tuple[str, bool]
"""A planted value's category, and whether the attack got it whole."""


def screen(
    train: AttackData,
    test: AttackData,
    attack: str = "probe",
    *,
    seed: int = 0,
    level: float = 0.95,
    limit: float = 0.2,
) -> Reading:
    """Fits a fresh attack on ``train``, and counts whole values of ``test`` that it gets exactly.

    A category that leaks whole is a seventh of the values where seven are hidden, and would not
    show among them all: where they stay below ``limit`` together and one is above it by itself, the
    figures are that one's. Its interval is for all categories together (Bonferroni), so that many
    do not cry wolf.

    Raises ``ValueError`` for an attack that is not for canaries, or where nothing could be scored.
    """
    found = _attempts(train, test, attack, seed)
    blindly = _attempts(blind(train, seed), blind(test, seed + 1), attack, seed)
    if not found or not blindly:
        raise ValueError(f"attack {attack!r} gave no guess that could be scored")
    chance = sum(won for _, won in blindly) / len(blindly)
    parts: dict[str, list[Attempt]] = {}
    for category, won in found:
        parts.setdefault(category, []).append((category, won))
    strict = 1 - (1 - level) / len(parts)
    each = {c: _tallied(part, chance, strict) for c, part in sorted(parts.items())}
    whole, allowed = _tallied(found, chance, level), max(limit, chance)
    above = [c for c, s in each.items() if s.asr_low > allowed]
    if whole.asr_low > allowed or not above:
        return Reading(whole, each, "")
    worst = max(above, key=lambda c: each[c].asr_low)
    return Reading(each[worst], each, worst)


def _tallied(found: Sequence[Attempt], chance: float, level: float) -> Screened:
    n, won = len(found), sum(won for _, won in found)
    return Screened(n, won, won / n, *wilson(won, n, level), chance)


def _attempts(train: AttackData, test: AttackData, attack: str, seed: int) -> list[Attempt]:
    """Each value that a fresh attack tried. Raises ``ValueError`` for one that is not for
    canaries."""
    if attack not in ATTACKS:
        raise ValueError(f"attack={attack!r}: for canaries there are {', '.join(ATTACKS)}")
    words = Words.of(train)
    fitted = attack_class(attack).build(ATTACKS[attack]).fit(words.rename(train), seed=seed)
    guesses = fitted.recover(words.rename(test))
    truth = [s for row in test.secrets for s in row]
    return [
        (s.category, words.back(g.ids) == s.ids)
        for g, s in zip(guesses, truth, strict=True)
        if g.ids is not None
    ]
