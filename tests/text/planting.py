"""Plants values in requests and answers: every place, every spelling, from a seed."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.text.policies import TERMS

_WORDS = (
    "the patient asked about a bill from March and the desk said it was 1,250.00 naïve “quotes” "
    'and \\ or {"a": 1} or <b>bold</b> &amp; 50% of 12 rows: résumé, 東京, 🦊'
).split()
_NAMES = ("Ada", "Björn", "Chloë", "D'Arcy", "Łukasz", "Mei", "Noor", "Quentin", "Renée", "Tariq")


def _name(draw: random.Random) -> str:
    return f"{draw.choice(_NAMES)} {draw.choice('BCDFGHKLMNPRSTV')}{draw.choice(('eller', 'ovak'))}"


def _digits(draw: random.Random, n: int) -> str:
    return str(draw.randint(10 ** (n - 1), 10**n - 1))


VALUES: tuple[Callable[[random.Random], str], ...] = (
    _name,
    lambda d: f"{_digits(d, 3)}-{_digits(d, 2)}-{_digits(d, 4)}",
    lambda d: f"{d.choice(_NAMES).lower()}.{_digits(d, 3)}@example.org",
    lambda d: f"s3cr3t-{_digits(d, 6)}!#",
    lambda d: _digits(d, 9),
)
SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda v: v,
    str.upper,
    lambda v: v.replace(" ", "\n"),
    lambda v: v.replace(" ", "\u00a0"),
    lambda v: unicodedata.normalize("NFD", v),
    lambda v: v[:3] + "\u200b" + v[3:],
)


@dataclass(frozen=True)
class Planted:
    """One value in one place."""

    value: str
    written: str
    """As it stands there."""
    named: bool
    """Whether the sender names it; else it belongs to an own category."""
    place: str
    messages: list[Any]


def planted(seed: int) -> Iterator[Planted]:
    """Without an end."""
    draw = random.Random(seed)
    while True:
        own = draw.random() < 0.4
        value = _own(draw) if own else draw.choice(VALUES)(draw)
        written = draw.choice(SPELLINGS)(value)
        place = draw.choice([*PLACES])
        text = f"{_prose(draw)} {written} {_prose(draw)}"
        yield Planted(value, written, not own, place, _around(draw, PLACES[place](text, written)))


def _own(draw: random.Random) -> str:
    return draw.choice(TERMS) if draw.random() < 0.7 else f"PRJ-{_digits(draw, 4)}"


def _prose(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(1, 8)))


def _around(draw: random.Random, message: Any) -> list[Any]:
    before = [{"role": "user", "content": _prose(draw)} for _ in range(draw.randint(0, 2))]
    return [*before, message, {"role": "assistant", "content": _prose(draw)}]


def _call(arguments: str, name: str = "find") -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _json(value: Any, draw: int = 0) -> str:
    return json.dumps(value, ensure_ascii=bool(draw), indent=1 if draw else None)


def _halves(text: str, written: str) -> list[Any]:
    at = text.index(written) + len(written) // 2
    return [{"type": "text", "text": text[:at]}, {"type": "text", "text": text[at:]}]


PLACES: dict[str, Callable[[str, str], Any]] = {
    "system": lambda t, w: {"role": "system", "content": t},
    "developer": lambda t, w: {"role": "developer", "content": [{"type": "text", "text": t}]},
    "user": lambda t, w: {"role": "user", "content": t},
    "name": lambda t, w: {"role": "user", "name": w, "content": "hello"},
    "parts": lambda t, w: {"role": "user", "content": _halves(t, w)},
    "answer": lambda t, w: {"role": "assistant", "content": t},
    "reasoning": lambda t, w: {"role": "assistant", "content": "", "reasoning": t},
    "reasoning_content": lambda t, w: {"role": "assistant", "reasoning_content": t},
    "refusal": lambda t, w: {"role": "assistant", "content": None, "refusal": t},
    "argument": lambda t, w: _call(_json({"q": t, "n": [1, 2.5]})),
    "escaped argument": lambda t, w: _call(_json({"q": [{"t": t}]}, 1)),
    "argument's key": lambda t, w: _call(_json({"x": {w: True}})),
    "argument in an argument": lambda t, w: _call(_json({"body": _json({"q": t}, 1)}, 1)),
    "broken arguments": lambda t, w: _call(f'{{"q": {json.dumps(t)}, '),
    "tool's name": lambda t, w: _call("{}", w),
    "function_call": lambda t, w: {
        "role": "assistant",
        "function_call": {"name": "f", "arguments": _json({"q": t})},
    },
    "result": lambda t, w: {"role": "tool", "tool_call_id": "call_1", "content": t},
    "result in JSON": lambda t, w: {
        "role": "tool",
        "tool_call_id": "call_1",
        "content": _json([{"row": 1, "text": t}]),
    },
    "result's item": lambda t, w: {
        "type": "function_call_output",
        "call_id": "call_1",
        "output": _json({"found": {"text": t}}),
    },
}
