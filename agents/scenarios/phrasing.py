"""How a record becomes prose: sentence patterns, filler, and the questions asked about it."""

from __future__ import annotations

import random
from collections.abc import Sequence

SENTENCES = (
    "The {label} is {value}.",
    "{Label}: {value}.",
    "{Label}: {value}\n",
    "On file, the {label} reads {value}.",
    "We recorded {value} as the {label}.",
    "As {label} the form gives {value}.",
    "The {noun}'s {label} is {value}.",
    "For the {noun}, {value} was entered as {label}.",
    "Listed {label}: {value};",
    "{Label} = {value}\n",
)
OPENINGS = (
    "Summary of the {noun} file.",
    "{Noun} record.",
    "Notes on this {noun}.",
    "The following was collected for the {noun}.",
    "Extract from the {noun} register.",
    "Internal file, {noun}.",
    "",
)
FILLER = (
    "The file was checked last week.",
    "No further action is needed today.",
    "Please keep this page in the folder.",
    "A copy was sent to the archive.",
    "The form was filled in by hand.",
    "All entries were confirmed by phone.",
    "There was a short delay at the desk.",
    "The office closes early on Friday.",
    "Some pages of the file are missing.",
    "See the attachment for more.",
    "The next review is due in spring.",
    "Two people were present.",
    "This entry replaces an older one.",
    "Nothing unusual was noted.",
    "The system was slow that day.",
    "A reminder goes out next month.",
)
QUESTIONS = (
    "What is the {label}?",
    "What is the {noun}'s {label}?",
    "Give the {label}.",
    "Which {label} is on file?",
    "Tell me the {label} of the {noun}.",
    "{Label}?",
)
ABSENT = "not stated"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(pattern: str, *, label: str = "", noun: str = "", value: str = "{value}") -> str:
    """Fills a pattern; ``{value}`` stays where no value is given."""
    return pattern.format(label=label, Label=_cap(label), noun=noun, Noun=_cap(noun), value=value)


def sentence(
    rng: random.Random, label: str, noun: str, patterns: Sequence[str] = SENTENCES
) -> tuple[str, str]:
    """Text before and after the value."""
    before, after = fill(rng.choice(patterns), label=label, noun=noun).split("{value}")
    return before, after


def question(rng: random.Random, label: str, noun: str) -> str:
    return fill(rng.choice(QUESTIONS), label=label, noun=noun)
