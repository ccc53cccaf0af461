"""500 planted values: none reaches the audience, and nothing else is lost."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import pytest

from lcguard.text.guard import TextGuard
from tests.text.planting import PLACES, Planted, planted
from tests.text.policies import guard, leaks

N, SEED = 500, 20


@pytest.fixture(scope="module")
def values() -> list[Planted]:
    return list(islice(planted(SEED), N))


@pytest.fixture(scope="module")
def edge() -> TextGuard:
    return guard()


def test_they_are_in_every_place(values: list[Planted]) -> None:
    assert {p.place for p in values} == set(PLACES)
    assert all(leaks(p.messages, p.value) for p in values), "the oracle sees what is planted"


def test_none_reaches_the_audience(values: list[Planted], edge: TextGuard) -> None:
    left = []
    for p in values:
        found = edge.messages(p.messages, [p.value] if p.named else None)
        if leaks(found.value, p.value) or sum(found.hidden.values()) != 1:
            left.append((p.place, p.written))
    assert left == []


def test_nothing_else_is_lost(values: list[Planted], edge: TextGuard) -> None:
    """With the value back in the placeholder's place it is what was sent, byte for byte."""
    other = []
    for p in values:
        found = edge.messages(p.messages, [p.value] if p.named else None)
        (original,) = found.originals.values()
        name = next(iter(found.originals))
        back = json.loads(_restored(json.dumps(found.value), name, original, p))
        if p.place == "parts":
            back = _joined(back)
        if back != (_joined(p.messages) if p.place == "parts" else p.messages):
            other.append((p.place, p.written))
    assert other == []


def test_arguments_that_parsed_parse(values: list[Planted], edge: TextGuard) -> None:
    n = 0
    for p in values:
        found = edge.messages(p.messages, [p.value] if p.named else None)
        for sent, got in zip(_arguments(p.messages), _arguments(found.value), strict=True):
            try:
                shape = _shape(json.loads(sent))
            except ValueError:
                continue
            assert _shape(json.loads(got)) == shape, (p.place, p.written)
            n += 1
    assert n > 50


@pytest.mark.parametrize("forbid", [[], ["project"]])
def test_what_is_allowed_passes_as_it_is(values: list[Planted], forbid: list[str]) -> None:
    """Nothing is forbidden, or something that is not there."""
    edge = guard(forbid=forbid)
    for p in values[:100]:
        if p.named:
            assert edge.messages(p.messages).value == p.messages


def _restored(text: str, name: str, original: str, p: Planted) -> str:
    """The answer's JSON with what was planted in place of the placeholder, as deep as it was."""
    depth = 1
    if p.place in ("argument", "escaped argument", "argument's key", "broken arguments"):
        depth = 2
    elif p.place in ("function_call", "result in JSON", "result's item"):
        depth = 2
    elif p.place == "argument in an argument":
        depth = 3
    ascii_only = p.place in ("escaped argument", "argument in an argument", "broken arguments")
    written = p.written
    for level in range(depth):
        written = json.dumps(written, ensure_ascii=ascii_only or level == depth - 1)[1:-1]
    return re.sub(rf"\[[A-Z]+-{name}\w+\]", lambda _: written, text)


def _joined(messages: list[Any]) -> list[Any]:
    return [
        "".join(part["text"] for part in m["content"]) if isinstance(m["content"], list) else m
        for m in messages
    ]


def _arguments(messages: list[Any]) -> list[str]:
    out = []
    for m in messages:
        out += [call["function"]["arguments"] for call in m.get("tool_calls") or ()]
        out += [m["function_call"]["arguments"]] if "function_call" in m else []
    return out


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return [_shape(item) for item in value.values()]
    if isinstance(value, list):
        return [_shape(item) for item in value]
    return type(value).__name__ if not isinstance(value, str) else "str"
