"""What is built like an official number of any country: passport, tax, social-security, licence.

No list of formats is complete, so the form is wide: enough letters and digits, in groups with
separators between them, and enough digits among them. Dates, times and amounts of money look the
same and are left out by their form.
"""

from __future__ import annotations

import re

from lcguard.value_search import Range

DIGITS, LENGTH = 5, 7
"""The fewest digits, and letters and digits, of an official number that is written with digits."""
CODE = 7
"""The fewest letters and digits of one that has fewer digits: capitals and digits in one word."""

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_YEAR, _DAY = r"(?:1[89]|20|21)\d\d", r"[0-3]?\d"
# Not a part of a longer run of digits: a number may end like a date.
_ASIDE = re.compile(
    r"(?<![\w/.-])(?:"
    rf"{_YEAR}([-/.])[01]?\d\1{_DAY}(?:[T ]\d\d?:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"
    rf"|{_DAY}([-/.]){_DAY}\2{_YEAR}"
    rf"|{_MONTH}\.? {_DAY}(?:st|nd|rd|th)?,? {_YEAR}|{_DAY}(?:st|nd|rd|th)? {_MONTH}\.?,? {_YEAR}"
    r"|[$€£¥] ?\d{1,3}(?:[,.]?\d{3})*(?:[.,]\d\d?)?"
    r")(?![\w/-]|[.,]\d)",
    re.IGNORECASE,
)
# Groups of letters and digits with a digit in them; up to three signs or one space with two.
_SEPARATOR = r"(?:(?!\. )[-./:#+\\=()\[\]'\" ]{1,3})"  # ". " ends a sentence
_GROUP = r"[A-Za-z]{0,6}\d[A-Za-z0-9]*"
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9])(?:[A-Z]{{1,3}}{_SEPARATOR})?{_GROUP}(?:{_SEPARATOR}{_GROUP})*"
    rf"(?:{_SEPARATOR}[A-Z]{{1,3}}(?![A-Za-z0-9]))?"
)
_CODE = re.compile(rf"(?<![A-Za-z0-9])(?=[A-Z]*\d)(?=\d*[A-Z])[A-Z0-9]{{{CODE},}}(?![A-Za-z0-9])")


def official_numbers(text: str) -> list[Range]:
    """Character ranges of what may be one, in order of kind; ``text`` has plain digits."""
    bare = _ASIDE.sub(lambda m: "\n" * len(m.group()), text)
    found = [m.span() for m in _NUMBER.finditer(bare) if _enough(m.group())]
    return found + [m.span() for m in _CODE.finditer(bare)]


def _enough(text: str) -> bool:
    return sum(c.isdigit() for c in text) >= DIGITS and sum(c.isalnum() for c in text) >= LENGTH
