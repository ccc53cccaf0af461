"""The category of a value that comes without one: by its form, then by keywords around it.

An e-mail address is ``contact``; a capitalised run that begins with a title or a given name of
Faker's lists is ``person``; otherwise the first category of the keywords in ``words.toml`` decides
of which one stands in the sentence that the value is from; otherwise it is ``confidential``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from lcguard.agents.scenarios.files import own_data
from lcguard.agents.scenarios.values import known_names
from lcguard.categories import Category

_PATTERNS: Final[Mapping[Category, re.Pattern[str]]] = {
    category: re.compile("|".join(rf"(?<!\w){re.escape(word)}" for word in words))
    for category, words in own_data("words.toml")["keywords"].items()
}
_TITLES: Final = frozenset(
    ("mr.", "mrs.", "ms.", "dr.", "prof.", "professor", "doctor", "senator", "judge")
)
_GIVEN: Final = known_names("first")


def category_of(kind: str, words: tuple[str, ...], sentence: str) -> Category:
    """Category of an atom of ``kind`` (``atoms``) that comes from ``sentence``."""
    if kind == "email":
        return "contact"
    if kind == "name" and (words[0] in _TITLES or words[0] in _GIVEN):
        return "person"
    if kind == "amount":
        return "finance"
    lower = sentence.lower()
    for category, pattern in _PATTERNS.items():
        if pattern.search(lower):
            return category
    return "confidential"
