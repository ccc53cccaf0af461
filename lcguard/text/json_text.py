"""JSON inside a string, as tool calls and their results have it: its strings and numbers, each with
the way back to the characters that stand for it.

A value is replaced where it stands, so that all other characters (spacing, escapes, the order of
keys, digits that no float holds) stay as they are, and what parsed before parses afterwards.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal

from lcguard.normalise import Form

_TOKEN = re.compile(r'"((?:[^"\\]++|\\.)*+)"|(-?\d[\d.eE+-]*)', re.DOTALL)
_PIECE = re.compile(
    r"(?P<pair>\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|(?P<unit>\\u[0-9a-fA-F]{4})|(?P<sign>\\.)|[^\\]+",
    re.DOTALL,
)
_LONGEST = 400
"""Digits of a number that is written out: no double has more."""
_SIGNS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True)
class JsonToken:
    """A string (a key or a value), or a number, of a JSON text."""

    form: Form
    """What it says; maps to the characters of the JSON text."""
    is_number: bool


def json_tokens(text: str, scalars: bool = False) -> list[JsonToken] | None:
    """The strings and numbers of a JSON text in order; None where ``text`` is not JSON.

    Args:
        scalars: whether a string or a number alone counts as JSON: in a tool call's arguments it
            does, in prose it is a word.
    """
    start = text.lstrip()[:1]
    if not (start in ("{", "[") or (scalars and (start in ('"', "-") or start.isdigit()))):
        return None
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    # what parses has quotes around strings alone, so that its tokens are found without a parser
    return [_token(match) for match in _TOKEN.finditer(text)]


def spellings_of_number(digits: str) -> list[str]:
    """A JSON number as it stands, and as whole digits where it is a whole number written otherwise
    (``9.12551029e8``)."""
    if digits.lstrip("-").isdigit():
        return [digits]
    value = Decimal(digits)
    if value.adjusted() > _LONGEST or value != value.to_integral_value():
        return [digits]
    return [digits, f"{value.to_integral_value():f}"]


def escaped(text: str, depth: int) -> str:
    """``text`` as it stands ``depth`` JSON strings deep."""
    for _ in range(depth):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


def _token(match: re.Match[str]) -> JsonToken:
    if match[2] is not None:
        start, end = match.span(2)
        return JsonToken(
            Form(match[2], tuple(range(start, end)), tuple(range(start + 1, end + 1))), True
        )
    return JsonToken(_read(match[1], match.start(1)), False)


def _read(body: str, at: int) -> Form:
    parts: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for piece in _PIECE.finditer(body):
        start, end = piece.span()
        match piece.lastgroup:
            case "pair":
                high, low = int(body[start + 2 : start + 6], 16), int(body[end - 4 : end], 16)
                parts.append(chr(0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF)))
            case "unit":
                parts.append(chr(int(body[start + 2 : end], 16)))
            case "sign":
                sign = body[start + 1]
                parts.append(_SIGNS.get(sign, sign))
            case _:
                parts.append(piece.group())
                starts += range(at + start, at + end)
                ends += range(at + start + 1, at + end + 1)
                continue
        starts.append(at + start)
        ends.append(at + end)
    return Form("".join(parts), tuple(starts), tuple(ends))
