"""The category of a value that comes without one: by its form, then by keywords around it.

An e-mail address is ``contact``; a capitalised run that begins with a title or a given name of
Faker's lists is ``person``; otherwise the first category below decides of which a keyword stands
in the sentence that the value is from; otherwise it is ``confidential``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from lcguard.agents.scenarios.values import vocabulary
from lcguard.categories import Category

KEYWORDS: Final[Mapping[Category, tuple[str, ...]]] = {
    "government_id": (
        "social security",
        "ssn",
        "passport",
        "driver's license",
        "tax id",
        "visa number",
        "license number",
        "national id",
    ),
    "account": (
        "password",
        "account number",
        "credit card",
        "card number",
        "bank account",
        "username",
        "user name",
        "login",
        "access code",
        "api key",
        "routing number",
        "pin code",
    ),
    "health": (
        "diagnos",
        "health",
        "medical",
        "medication",
        "therap",
        "chemo",
        "disease",
        "disorder",
        "symptom",
        "treatment",
        "patient",
        "depress",
        "anxiety",
        "cancer",
        "surgery",
        "pregnan",
        "illness",
        "clinic",
        "hospital",
        "addiction",
        "counseling",
        "doctor",
        "prescri",
        "hiv",
        "diabet",
        "allerg",
        "disabilit",
        "rehab",
        "psych",
    ),
    "finance": (
        "salary",
        "salaries",
        "income",
        "debt",
        "loan",
        "mortgage",
        "bankrupt",
        "credit score",
        "financ",
        "budget",
        "bonus",
        "revenue",
        "profit",
        "invest",
        "fund",
        "price",
        "cost",
        "payment",
        "paid",
        "pay ",
        "donat",
        "tax",
        "invoice",
        "net worth",
        "savings",
        "$",
        "€",
        "£",
        "wage",
        "compensation",
        "grant",
        "million",
        "billion",
    ),
    "contact": (
        "phone",
        "e-mail",
        "email",
        "home address",
        "mailing address",
        "lives at",
        "lives in",
        "postal",
        "zip code",
    ),
    "person": (
        "birth",
        "born",
        "years old",
        "age of",
        "sexual orientation",
        "religio",
        "immigra",
        "ethnic",
        "marriage",
        "married",
        "divorc",
        "pronoun",
        "citizenship",
        "identity of",
    ),
}
"""Beginnings of words, in lower case; the order is the precedence."""

_PATTERNS: Final = {
    category: re.compile("|".join(rf"(?<!\w){re.escape(word)}" for word in words))
    for category, words in KEYWORDS.items()
}
_TITLES: Final = frozenset(
    ("mr.", "mrs.", "ms.", "dr.", "prof.", "professor", "doctor", "senator", "judge")
)
_GIVEN: Final = frozenset(
    name.lower() for split in ("train", "test") for name in vocabulary("first", split)
)


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
