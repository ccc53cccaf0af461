"""How a record becomes prose: sentence patterns, filler, and the questions asked about it."""

from __future__ import annotations

import random

from lcguard.agents.scenarios.files import own_data

_WORDS = own_data("words.toml")["phrasing"]
OPENINGS: tuple[str, ...] = tuple(_WORDS["openings"])
FILLER: tuple[str, ...] = tuple(_WORDS["filler"])
ABSENT = "not stated"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(pattern: str, *, label: str = "", noun: str = "", value: str = "{value}") -> str:
    """Fills a pattern; ``{value}`` stays where no value is given."""
    return pattern.format(label=label, Label=_cap(label), noun=noun, Noun=_cap(noun), value=value)


def sentence(rng: random.Random, label: str, noun: str) -> tuple[str, str]:
    """Text before and after the value."""
    before, after = fill(rng.choice(_WORDS["sentences"]), label=label, noun=noun).split("{value}")
    return before, after


def question(rng: random.Random, label: str, noun: str) -> str:
    return fill(rng.choice(_WORDS["questions"]), label=label, noun=noun)
