"""Offsets of a value in a text: whether they lie beside it, and in what units they were counted.

Python counts characters; JavaScript, Java and C# count UTF-16 units, other tools bytes. Beyond
ASCII these differ, and a span a little beside its value guards the wrong text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import accumulate

Offsets = tuple[int, int]
"""Start, and end exclusive."""

UNITS: dict[str, Callable[[str], int]] = {
    "UTF-16 units": lambda c: 1 + (ord(c) > 0xFFFF),
    "UTF-8 bytes": lambda c: len(c.encode(errors="surrogatepass")),
}
"""Other ways of counting -> what a character counts there."""


def inside_word(text: str, i: int) -> bool:
    """Whether the boundary before character ``i`` parts two letters or two digits of one word.

    Never so between characters of a script that does not part words by spaces.
    """
    if not 0 < i < len(text):
        return False
    if unicodedata.combining(text[i]):
        return True
    before = _kind(text[i - 1])
    return before != "" and before == _kind(text[i])


def untidy(text: str, span: Offsets) -> bool:
    """Whether a span begins or ends inside a word or with white space: beside its value."""
    value = text[slice(*span)]
    return value != value.strip() or any(inside_word(text, i) for i in span)


def misread(text: str, spans: Sequence[Offsets]) -> tuple[str, list[Offsets]] | None:
    """The units in which offsets were counted if not in characters, and the offsets in characters.

    None where no span is untidy, or where one would be in every other reading too.
    """
    if not any(untidy(text, span) for span in spans):
        return None
    for name, unit in UNITS.items():
        # offset in these units -> in characters
        places = {at: i for i, at in enumerate(accumulate(map(unit, text), initial=0))}
        moved = [(places[a], places[b]) for a, b in spans if a in places and b in places]
        if len(moved) == len(spans) and not any(untidy(text, span) for span in moved):
            return name, moved
    return None


def _kind(c: str) -> str:
    category = unicodedata.category(c)
    return {"Lu": "letter", "Ll": "letter", "Lt": "letter", "Nd": "digit"}.get(category, "")
