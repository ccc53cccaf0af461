"""Categories of private information that a policy can forbid.

The order is fixed: it is the order of the C axis of every mask and of every trained guard, so a
new category is appended, never inserted.
"""

from __future__ import annotations

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
