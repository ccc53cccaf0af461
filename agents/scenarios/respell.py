"""One value in the spellings in which records, tools and people write it down."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import quote

DASHES: Final = "-\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"
SPACES: Final = " \u00a0\u2007\u2009\u202f\u3000\n\t"
UNSEEN: Final = "\u200b\u200c\u200d\u2060\ufeff\u00ad"


def wide(text: str) -> str:
    """In full-width characters."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def _each(text: str, change: Callable[[str], str]) -> str:
    return "".join(change(c) for c in text)


def _between(rng: random.Random, text: str, put: str) -> str:
    """``put`` at up to three places inside the text."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(1, max(1, len(text) - 1))
        text = text[:at] + put + text[at:]
    return text


SPELLINGS: Final[Mapping[str, Callable[[random.Random, str], str]]] = {
    "as written": lambda rng, v: v,
    "upper": lambda rng, v: v.upper(),
    "lower": lambda rng, v: v.lower(),
    "NFD": lambda rng, v: unicodedata.normalize("NFD", v),
    "wide": lambda rng, v: wide(v),
    "dashes": lambda rng, v: _each(v, lambda c: rng.choice(DASHES) if c == "-" else c),
    "spaced dashes": lambda rng, v: _each(v, lambda c: " - " if c == "-" else c),
    "spaces": lambda rng, v: _each(v, lambda c: rng.choice(SPACES) if c in "- " else c),
    "double spaces": lambda rng, v: _each(v, lambda c: c * 2 if c == " " else c),
    "no separators": lambda rng, v: "".join(c for c in v if c.isalnum()) or v,
    "line break": lambda rng, v: _each(v, lambda c: c + "\n" if c in "- " else c),
    "unseen": lambda rng, v: _between(rng, v, rng.choice(UNSEEN)),
    "markdown": lambda rng, v: f"**{v}**",
    "markdown inside": lambda rng, v: _each(v, lambda c: f"**{c}**" if c in "- " else c),
    "code": lambda rng, v: f"`{v}`",
    "in a word": lambda rng, v: f"ID_{v}_END",
    "json": lambda rng, v: json.dumps(_each(v, lambda c: "\u2011" if c == "-" else c))[1:-1],
    "url": lambda rng, v: quote(v, safe=""),
    "html": lambda rng, v: _each(v, lambda c: "&nbsp;" if c == " " else f"&#{ord(c)};"),
}


def respell(rng: random.Random, value: str, among: tuple[str, ...] = tuple(SPELLINGS)) -> str:
    """The value in a random one of the spellings."""
    return SPELLINGS[rng.choice(among)](rng, value)
