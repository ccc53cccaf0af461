"""Categories of private information that a policy can forbid.

The order is fixed: it is the order of the C axis of every mask and of every trained guard, so a
new category is appended, never inserted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, get_args

Category = Literal[
    "person", "government_id", "contact", "account", "health", "finance", "confidential"
]

CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)

DESCRIPTIONS: Final[dict[Category, str]] = {
    "person": "Names, birth dates and other traits that single out a person.",
    "government_id": "Passport, tax, social-security and licence numbers.",
    "contact": "E-mail and postal addresses, phone numbers.",
    "account": "Bank, card and customer numbers, user names, keys and passwords.",
    "health": "Diagnoses, measurements, medication, treatment.",
    "finance": "Income, balances, debts, scores.",
    "confidential": "What an organisation keeps to itself: code names, prices, plans.",
}

DERIVABLE: Final[tuple[Category, ...]] = ("health", "finance")
"""Categories with a derived value (a risk or salary band) that a policy may allow on its own."""


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: these categories in mask order, then those that a policy defines itself."""
    found = set(names)
    return (*(c for c in CATEGORIES if c in found), *sorted(found - {*CATEGORIES}))


def own_names(names: Iterable[str]) -> tuple[str, ...]:
    """Those that a policy defines itself (``lcguard.custom_categories``): no guard learnt them."""
    return tuple(name for name in names if name not in CATEGORIES)
